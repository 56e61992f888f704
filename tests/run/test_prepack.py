"""Prompts of any lengths share one row without padding: prepacked prefill, as the engine always does it."""

import random

import pytest
import torch

from satchel.core.request import Request
from satchel.core.serve_seams import Draft
from satchel.model.forward import Part, hidden, logits, padded
from satchel.model.paged import PAGE, Pool
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.run.toys import VOCABULARY, toy_decoder
from tests.tolerances import TOLERANCE

LIMITS = Limits(blocks=400, batch=64, step_tokens=256, context=256)


@pytest.fixture(scope="module")
def model():
    return toy_decoder().eval()


def prompts(count=64, seed=0):
    """Long-tailed: most are short, some are long; no two begin alike."""
    rng = random.Random(seed)
    lengths = [max(2, min(180, int(rng.paretovariate(0.8) * 3))) for _ in range(count)]
    return [(4 + i, *(rng.randrange(4, VOCABULARY) for _ in range(length - 1))) for i, length in enumerate(lengths)]


def pack(model, mine, pool):
    """The states of all prompts from one row, and their tables."""
    tables, parts, free, first = [], [], iter(range(pool.blocks)), 0
    for prompt in mine:
        tables.append([next(free) for _ in range(-(-len(prompt) // PAGE))])
        parts.append(Part(prompt, Draft(), tables[-1], 0, first))
        first += len(prompt)
    return hidden(model, pool.pages, parts), parts, tables


def test_packed_prompts_have_the_logits_keys_and_values_of_each_alone(model):
    mine, close = prompts(24), TOLERANCE[torch.float32]
    together, alone = (Pool(model.config, 120, torch.float32) for _ in range(2))
    x_ND, parts, tables = pack(model, mine, together)
    ends_RV = logits(model, x_ND[[part.all_rows.stop - 1 for part in parts]])  # of the last tokens alone
    for prompt, table, end_V in zip(mine, tables, ends_RV, strict=True):
        own_ND, (part,), (own,) = pack(model, [prompt], alone)
        own_V = logits(model, own_ND[[part.all_rows.stop - 1]])[0]
        assert (end_V - own_V).abs().max() <= close * own_V.abs().max()
        for kind in (0, 1):
            packed, single = (
                kept(pages, where, kind, len(prompt)) for pages, where in ((together, table), (alone, own))
            )
            assert (packed - single).abs().max() <= close * single.abs().max()


def kept(pool, table, kind, count):
    """The keys or the values that a table holds, [count, ...]."""
    data = pool.pages.data[table][:, :, kind]
    heads, dim = data.shape[2], data.shape[3] // PAGE
    shape = (heads, dim, PAGE) if kind == 0 else (heads, PAGE, dim)
    data = data.unflatten(3, (dim, PAGE) if kind == 0 else (PAGE, dim))
    assert data.shape[2:] == shape
    return data.movedim(4 if kind == 0 else 3, 1).flatten(0, 1)[:count]


def test_the_model_sees_each_token_of_every_prompt_once_and_rows_are_full(model):
    """Steps are filled across prompts, those that do not fit are cut: the fewest rows that there can be."""
    mine = prompts()
    engine = Engine(model, LIMITS)
    for prompt in mine:
        engine.submit(Request(prompt=prompt, max_tokens=1))
    engine.run()
    total, stats = sum(map(len, mine)), engine.stats()
    assert stats["tokens"] == total
    assert stats["steps"] == -(-total // LIMITS.step_tokens)
    longest = max(map(len, mine)) * len(mine)
    assert longest > 4 * total  # what padding to the longest would have computed


def test_answers_to_packed_prompts_are_those_of_each_alone(model):
    mine = prompts()
    engine = Engine(model, LIMITS)
    ids = [engine.submit(Request(prompt=prompt, max_tokens=6)) for prompt in mine]
    said = {id: [] for id in ids}
    for event in engine.run():
        said[event.id] += event.tokens
    for id, prompt in zip(ids, mine, strict=True):
        single = Engine(model, LIMITS)
        single.submit(Request(prompt=prompt, max_tokens=6))
        assert said[id] == [token for event in single.run() for token in event.tokens]


def test_filler_up_to_a_size_that_steps_have_is_less_than_a_quarter():
    assert all(padded(rows) - rows <= rows / 4 for rows in range(1, 5000))
