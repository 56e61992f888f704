"""Logits of one storage of the weights in all compositions of a step: python -m bench._company_run '{"dtype": ...}'.

All of it goes through the engine's own pass (model/forward.py): rows padded, keys and values in pages, heads in groups.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import satchel
from bench._serve_run import prompts
from satchel.core.book import make
from satchel.core.serve_seams import Draft
from satchel.model.decoder import Decoder
from satchel.model.forward import HEAD_ROWS, Part, hidden, logits
from satchel.model.load import load
from satchel.model.paged import PAGE, Pool
from satchel.model.source import find_source
from satchel.run.assemble import DTYPES

# S texts, T tokens of each, V vocabulary

COMPOSITIONS = {  # sequences in a step, and tokens of each
    "beside others": (8, 0),
    "in parts of 16": (1, 16),
    "in parts of 16, beside others": (8, 16),
    "token by token": (1, 1),
    "token by token, beside others": (8, 1),
}


def main(case: dict[str, Any]) -> dict[str, Any]:
    """For each composition, how far its logits are from those of each text alone and whole; and the perplexities."""
    model = load(find_source(case["model"]), DTYPES[case["dtype"]], format=make("format", case["format"]))
    texts = prompts(case["texts"], case["tokens"], 11)
    alone_STV = logits_of(model, texts, 1, 0)
    found = {name: difference(logits_of(model, texts, *how), alone_STV) for name, how in COMPOSITIONS.items()}
    return {"compositions": found, "perplexity": perplexity(alone_STV, texts), "theirs": theirs(model, texts, case)}


@torch.inference_mode()
def logits_of(model: Decoder, texts: Sequence[Sequence[int]], together: int, part: int) -> Tensor:
    """Logits [S, T, V] with so many texts in a step, and so many tokens of each; 0: all of them."""
    return torch.cat([_group(model, texts[at : at + together], part) for at in range(0, len(texts), together)])


def _group(model: Decoder, texts: Sequence[Sequence[int]], part: int) -> Tensor:
    length = len(texts[0])
    blocks, step = -(-length // PAGE), part or length
    weight = model.model.embed_tokens.weight
    pool = Pool(model.config, blocks * len(texts), weight.dtype, weight.device)
    tables = [range(number * blocks, (number + 1) * blocks) for number in range(len(texts))]
    pieces = []
    for past in range(0, length, step):
        parts = [
            Part(text[past : past + step], Draft(), list(table), past, number * min(step, length - past))
            for number, (text, table) in enumerate(zip(texts, tables, strict=True))
        ]
        rows = sum(one.fed for one in parts)
        x_ND = hidden(model, pool.pages, parts)[:rows]
        heads_NV = torch.cat([logits(model, some) for some in x_ND.split(HEAD_ROWS)])
        pieces.append(heads_NV.view(len(texts), -1, heads_NV.shape[-1]))
    return torch.cat(pieces, 1)


def difference(found_STV: Tensor, alone_STV: Tensor) -> dict[str, float]:
    """The largest and the usual difference of a logit, and the share of greedy tokens that change."""
    apart_STV = (found_STV - alone_STV).abs()
    changed = (found_STV.argmax(-1) != alone_STV.argmax(-1)).double().mean()
    return {"max": float(apart_STV.max()), "mean": float(apart_STV.mean()), "changed": float(changed)}


def perplexity(logits_STV: Tensor, texts: Sequence[Sequence[int]]) -> float:
    """Of all tokens but the first of each text."""
    next_ST = torch.tensor(texts)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits_STV[:, :-1].flatten(0, 1).float(), next_ST.flatten())
    return math.exp(float(loss))


@torch.inference_mode()
def theirs(model: Decoder, texts: Sequence[Sequence[int]], case: dict[str, Any]) -> dict[str, float]:
    """Perplexities by transformers of the same weights, unpacked: in float32, and in the dtype that computes here."""
    from transformers import AutoModelForCausalLM

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        satchel.save(model, f"{folder}/dense")
        for name in dict.fromkeys(("fp32", case["dtype"])):
            other = AutoModelForCausalLM.from_pretrained(f"{folder}/dense", dtype=DTYPES[name])
            found[name] = perplexity(torch.stack([other(torch.tensor([text])).logits[0] for text in texts]), texts)
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
