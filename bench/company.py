"""What company does to an answer's logits: `satchel bench company`, or `python -m bench.company --help`.

SmolLM2-135M, pieces of Python's reference, by storage of the weights: the logits of each text alone and whole against
those in the same pass as others, in parts, and token by token. What differs is rounding: a product with other rows
beside it may be summed in another order. Beside it the perplexity of the engine's own pass against transformers' on the
same weights.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench._harness import measure, write

STORAGES = {"fp32": ("fp32", "none"), "bf16": ("bf16", "none"), "int8": ("bf16", "int8"), "int4": ("bf16", "int4")}
STORAGES |= {"nf4": ("bf16", "nf4")}


def main(given: list[str] | None = None) -> None:
    """Measure, and write bench/results/company.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--quick", action="store_true", help="few tokens, written nowhere")
    asked = parser.parse_args(given)
    size = {"texts": 8, "tokens": 32} if asked.quick else {"texts": asked.texts, "tokens": asked.tokens}
    runs = {}
    for name, (dtype, storage) in STORAGES.items():
        runs[name] = measure("bench._company_run", {"model": "demo", "dtype": dtype, "format": storage} | size)
        print(name, runs[name], flush=True)
    table = [row(name, found) for name, found in runs.items()]
    print(*table, sep="\n")
    if not asked.quick:
        tokens = size["texts"] * size["tokens"]
        write("company", f"Logits alone and in company, SmolLM2-135M, {tokens:,} tokens of text", table, runs=runs)


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The worst of all compositions, and the perplexities."""
    if "error" in found:
        return {"weights": name, "logits differ, at most": found["error"]}
    kinds = found["compositions"].values()
    ours, theirs = found["perplexity"], found["theirs"]
    return {
        "weights": name,
        "logits differ, at most": round(max(kind["max"] for kind in kinds), 5),
        "on average": round(max(kind["mean"] for kind in kinds), 6),
        "greedy tokens that change": f"{max(kind['changed'] for kind in kinds):.2%}",
        "perplexity": round(ours, 3),
        "of transformers, same dtype": round(list(theirs.values())[-1], 3),
        "in fp32": round(theirs["fp32"], 3),
        "from fp32": f"{ours / theirs['fp32'] - 1:+.2%}",
    }


if __name__ == "__main__":
    main()
