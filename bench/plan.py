"""Predicted against measured: the peak of tensors, the peak of resident bytes and the seconds per step of real runs.

Every row is a process that plans its job as `satchel tune` does, then loads, trains, evaluates and writes it. Nothing
is fitted to these rows; what was ever calibrated (the planner's GROWTH, the tracker's PACKED, the device's curves) saw
neither the shapes nor the methods in HELD_OUT. The device's curves are measured once, at the start. Beside it: other
estimators on the same rows, the time that a rehearsal takes, and what satchel's allocator does for resident bytes and
costs in time.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from typing import Any

from bench._harness import interleave, measure, median, write
from bench._plan_peers import PEERS
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.device import CACHE, device

SMOLLM = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
SMOLLM |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5}
SMOLLM |= {"max_position_embeddings": 8192, "rope_theta": 1e5, "tie_word_embeddings": True, "hidden_act": "silu"}
QWEN = {"model_type": "qwen2", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048}
QWEN |= {"num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
QWEN |= {"max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu"}
GEMMA = {"model_type": "gemma2", "vocab_size": 64000, "hidden_size": 512, "intermediate_size": 1536}
GEMMA |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
GEMMA |= {"query_pre_attn_scalar": 64, "sliding_window": 128, "attn_logit_softcapping": 50.0}
GEMMA |= {"final_logit_softcapping": 30.0, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 1024}
SHAPES = {"smollm2": SMOLLM, "qwen2": QWEN, "gemma2": GEMMA, "gpt2": GPT2}
HELD_OUT = ("gemma2", "gpt2", "galore")  # shapes and a method that no constant was measured on

METHODS: list[dict[str, Any]] = [  # on every shape but gpt2
    {"batch": 4, "context": 256},
    {"batch": 1, "context": 768},
    {"batch": 2, "context": 256, "dtype": "fp32"},
    {"batch": 8, "context": 128, "micro_batch": 2},
    {"batch": 4, "context": 256, "activations": "full"},
    {"batch": 4, "context": 256, "activations": "selective"},
    {"batch": 4, "context": 192, "adapter": "dora"},
    {"batch": 4, "context": 192, "format": "int8"},
    {"batch": 4, "context": 192, "format": "nf4"},
    {"batch": 2, "context": 256, "format": "int4", "activations": "full"},
    {"batch": 4, "context": 192, "adapter": "none"},
    {"batch": 2, "context": 128, "adapter": "none", "dtype": "fp32"},
    {"batch": 4, "context": 256, "adapter": "none", "optimizer": "adamw8bit", "activations": "full"},
    {"batch": 4, "context": 128, "adapter": "none", "optimizer": "galore:rank=64"},
]
UNEVEN = (300, 120, 60, 32)  # the documents of a packed row
LLAMA = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
LLAMA_7B = LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
LLAMA_70B = LLAMA | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {"num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256}
SIZES = {"SmolLM2-135M": SMOLLM, "Llama 7B": LLAMA_7B, "Llama 70B": LLAMA_70B}
ALLOCATORS = {
    "pool": "satchel's page pool",
    "glibc": "the C library's, as it is",
    "mmap": "the C library's, mapping from 128 KiB on",
}
TARGETS = ("tensors", "resident", "seconds")


def grid() -> list[dict[str, Any]]:
    """The cases of the rows."""
    cases = [_case(shape, method) for shape in ("smollm2", "qwen2", "gemma2") for method in METHODS]
    for shape in ("smollm2", "qwen2", "gemma2"):
        cases.append(_case(shape, {"batch": 1, "context": sum(UNEVEN)}, UNEVEN))
    cases.append(_case("smollm2", {"batch": 2, "context": sum(UNEVEN), "adapter": "none"}, UNEVEN))
    whole = ({"batch": 4, "context": 256}, {"batch": 4, "context": 256, "adapter": "none"}, {"batch": 2, "context": 64})
    cases += [_case("smollm2", method, layers=30) for method in whole]
    cases += [_case("smollm2", {"batch": 2, "context": 256, "adapter": "rslora:rank=64"})]
    return cases + [_case("gpt2", METHODS[index]) for index in (0, 4, 10, 13)]


def quick() -> list[dict[str, Any]]:
    """One cheap case of each kind of prediction."""
    small = {"batch": 2, "context": 64}
    return [_case("smollm2", small, layers=4), _case("qwen2", small | {"adapter": "none"})]


def row(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case, and ask the peers about it."""
    print(f"{case['shape']}: {_spell(case)}", flush=True)
    found = {"shape": case["shape"], "job": _spell(case), "held_out": _held_out(case)}
    found |= measure("bench._plan_run", {k: v for k, v in case.items() if k != "shape"})
    if "error" in found:
        return found
    job, config = TuneJob(**case["job"]), ModelConfig.from_hf(case["hf"])
    packed = "knows no packed rows" if case["lengths"] else ""
    found["peers"] = {name: packed or ask(job, config) for name, ask in PEERS.items()}
    return found | {"error_of": {target: _error(found[target]) for target in TARGETS}}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors over the rows: ours for all and for those held out, then the peers' on the rows in their scope."""
    table = []
    for name, part in (("all rows", rows), ("held out", [r for r in rows if r["held_out"]])):
        for target in TARGETS:
            table.append(_line(f"satchel, {target}, {name}", [r["error_of"][target] for r in part]))
    for peer in PEERS:
        inside = [r for r in rows if not isinstance(r["peers"][peer], str)]
        for what, index, target in (("tensors", 0, "tensors"), ("with CUDA overhead", 1, "resident")):
            pairs = [(r["peers"][peer][index], r[target][1]) for r in inside]
            table.append(_line(f"{peer}, {what} against {target}", [_error(pair) for pair in pairs]))
    return table


def rehearsals() -> list[dict[str, Any]]:
    """Seconds of a rehearsal, by the size of the model."""
    job = {"model": "shape", "data": "demo", "batch": 1, "context": 2048}
    return [{"model": name} | measure("bench._plan_size", {"hf": hf, "job": job}) for name, hf in SIZES.items()]


def allocators(repetitions: int) -> list[dict[str, Any]]:
    """The same LoRA run under each allocator: resident bytes above the start, their spread, CPU seconds a step."""
    runs: dict[str, list[dict]] = {name: [] for name in ALLOCATORS}
    for name in interleave(ALLOCATORS, repetitions):
        runs[name].append(measure("bench._plan_alloc", name))
    return [_allocator(ALLOCATORS[name], found) for name, found in runs.items()]


def main(arguments: list[str] | None = None) -> None:
    """Run the bench and write its results; with --quick two rows, printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cheap rows, nothing written")
    if parser.parse_args(arguments).quick:
        print(json.dumps([row(case) for case in quick()], indent=1))
        return
    shutil.rmtree(CACHE, ignore_errors=True)
    curves = device("cpu").curves
    rows = [row(case) for case in grid()]
    failed = [r for r in rows if "error" in r]
    table = summary([r for r in rows if "error" not in r])
    for line in table:
        print(json.dumps(line))
    study = {"rehearsals": rehearsals(), "allocators": allocators(3)}
    held_out = {"held_out": HELD_OUT, "failed": len(failed), "curves": curves}
    write("plan", f"Predicted against measured on {len(rows)} runs", table, rows=rows, **study, **held_out)


def _case(shape: str, fields: dict[str, Any], lengths: Iterable[int] = (), layers: int = 8) -> dict[str, Any]:
    real = shape == "smollm2"
    hf = SHAPES[shape] | ({"num_hidden_layers": layers} if real else {})
    job = {"model": "demo" if real else shape, "data": "demo"} | fields
    return {"shape": shape, "hf": hf, "job": job, "lengths": list(lengths), "layers": hf.get("num_hidden_layers")}


def _spell(case: dict[str, Any]) -> str:
    fields = {name: value for name, value in case["job"].items() if name not in ("model", "data")}
    rest = {"layers": case["layers"], "documents": case["lengths"]}
    return " ".join(f"{name}={value}" for name, value in (fields | rest).items() if value)


def _held_out(case: dict[str, Any]) -> bool:
    return case["shape"] in HELD_OUT or case["job"].get("optimizer", "").partition(":")[0] in HELD_OUT


def _error(pair: Iterable[float]) -> float:
    predicted, measured = pair
    return predicted / measured - 1


def _line(name: str, errors: list[float]) -> dict[str, Any]:
    """Percent; the worst under-prediction is the most negative error, 0 if there is none."""
    if not errors:
        return {"estimate": name, "rows": 0}
    ranked = sorted(abs(error) for error in errors)
    found = {"median": median(ranked), "95th": ranked[int(0.95 * (len(ranked) - 1))], "worst": ranked[-1]}
    found |= {"worst under": min([0.0, *errors])}
    return {"estimate": name, "rows": len(errors)} | {f"{k}, %": round(100 * v, 2) for k, v in found.items()}


def _allocator(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    if failed := [run for run in runs if "error" in run]:
        return {"allocator": name} | failed[0]
    resident = [run["resident"] for run in runs]
    return {
        "allocator": name,
        "resident_bytes": median(resident),
        "spread": (max(resident) - min(resident)) / median(resident),
        "cpu_s": median(run["cpu_s"] for run in runs),
        "wall_s": median(run["wall_s"] for run in runs),
        "tensor_bytes": runs[0]["tensors"],
    }


if __name__ == "__main__":
    main()
