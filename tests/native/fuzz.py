"""Random calls of the operators, of shapes that no model has: `python -m tests.native.fuzz ROUNDS SEED`.

Nothing is compared, other tests do that; what reads or writes where it must not is for a sanitizer to see. Every tensor
is an allocation of its own, of the very size that it needs.
"""

import random
import sys
from itertools import accumulate, pairwise

import torch

from satchel.model.bank import add_low_rank
from satchel.model.kv import kv_of, token_bytes
from satchel.model.paged import PAGE, Stretch, sights
from satchel.native import gated, levels, linear, rms_norm, rotate, sample
from satchel.native.pointwise import ACTS
from satchel.optim._shared import STORES, adam_, zero_moments

DTYPES = (torch.float32, torch.bfloat16)


def numbers(rng, *shape, dtype):
    """Normal ones, with a few that are as large, small or little of a number as can be."""
    out = torch.randn(shape) * 10 ** rng.uniform(-3, 3)
    if out.numel() and rng.random() < 0.3:
        extremes = torch.tensor([0.0, 1e-38, -1e-44, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
        out.view(-1)[torch.randint(out.numel(), (8,))] = extremes
    return out.to(dtype)


def pointwise(rng):
    dtype, rows, width = rng.choice(DTYPES), rng.choice((0, 1, 2, 7, 200)), rng.randrange(1, 300)
    x, y = numbers(rng, rows, width, dtype=dtype), numbers(rng, rows, width, dtype=dtype)
    rms_norm(x, numbers(rng, width, dtype=dtype), plus_one=rng.random() < 0.5, late_cast=rng.random() < 0.5)
    gated(x, y, rng.choice(list(ACTS)))
    half = rng.randrange(1, 50)
    heads, dim = rng.randrange(1, 5), 2 * half + rng.choice((0, 0, 1, 13))
    tables = (numbers(rng, rows, half, dtype=dtype) for _ in range(2))
    rotate(numbers(rng, rng.randrange(1, 3), rows, heads, dim, dtype=dtype), *tables)


def drawing(rng):
    logits_V = numbers(rng, rng.choice((1, 2, 15, 16, 17, 999, 20_001)), dtype=torch.float32)
    top_k, top_p = rng.choice((0, 1, 5, 10_000)), rng.choice((1.0, 0.5, 0.999999, 1e-9))
    sample(logits_V, rng.getrandbits(64), 10 ** rng.uniform(-3, 3), top_k, top_p, rng.choice((0.0, 0.1, 1.0)))


def products(rng):
    kind, kernel = rng.choice(linear.KINDS), linear.kernel(rng.choice(levels.supported()))
    assert kernel, "a level did not pass its test"
    inputs, outputs = linear.form(kind).inputs * rng.randrange(1, 6), linear.ROWS * rng.randrange(1, 6)
    inputs *= rng.choice((1, 1, 1024 // inputs + 1))  # rows of 1,024 on go another way
    tiles, dtype = linear.example(kind, outputs, inputs, torch.Generator().manual_seed(0)), rng.choice(DTYPES)
    bias = torch.ones(outputs) if rng.random() < 0.5 else None
    weight = linear.matrix(tiles, bias, kind, outputs, inputs)
    x_NI = numbers(rng, rng.choice((1, 2, 4, 5, 7, 9, 31, 32, 33, 70)), inputs, dtype=dtype)
    kernel.linear(weight, x_NI, torch.empty(len(x_NI), outputs, dtype=dtype))
    kernel.rows(weight, torch.randint(outputs, (5,)), torch.empty(5, inputs, dtype=dtype))
    kernel.dense(weight, torch.empty(outputs, inputs, dtype=dtype))


def attention(rng):
    dtype, kv_heads, dim = rng.choice(DTYPES), rng.randrange(1, 4), rng.choice((rng.randrange(1, 70), 32, 64, 96, 128))
    heads = kv_heads * rng.choice((1, 2, 3, 9))
    past = [rng.choice((0, 1, 15, 16, 130, 300, 700)) for _ in range(rng.randrange(1, 5))]
    new = [rng.choice((1, 1, 2, 17, 40)) for _ in past]
    sizes = [-(-(p + n) // PAGE) for p, n in zip(past, new, strict=True)]
    first, table = ([0, *accumulate(counts)] for counts in (new, sizes))
    kv = rng.choice(("none", "int8"))
    each = PAGE * token_bytes(kv_of(kv), dim, dtype) // dtype.itemsize
    data = numbers(rng, sum(sizes), 2, kv_heads, each, dtype=dtype)
    q, k, v = (numbers(rng, sum(new), h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    bounds = torch.tensor([table[:-1], first[:-1], past, first[1:]], dtype=torch.int32)
    pages, how = torch.randperm(sum(sizes)).int(), (0.1, rng.choice((0, 1, 20)), rng.choice((0.0, 5.0)))
    parents = [[rng.randrange(-1, i) for i in range(rng.choice((0, n)))] for n in new]
    sight = torch.tensor(sights([Stretch((), p, n, tree) for p, n, tree in zip(past, new, parents, strict=True)]))
    torch.ops.satchel.paged_attention(q, k, v, data[:, 0], data[:, 1], pages, bounds, sight, *how, kv_of(kv).kernel)


def updates(rng):
    dtype, inputs, outputs = rng.choice(DTYPES), rng.randrange(1, 100), rng.randrange(1, 100)
    stops = [0, *accumulate(rng.randrange(1, 9) for _ in range(3))]
    ranks = [rng.choice((0, 1, 3, 16)) for _ in range(3)]
    starts = [0, *accumulate(rank * (inputs + outputs) for rank in ranks)]
    ups = [start + rank * inputs for start, rank in zip(starts, ranks, strict=False)]
    flat = numbers(rng, max(starts[-1], 1), dtype=dtype)
    x_NI, y_NO = (numbers(rng, stops[-1], width, dtype=dtype) for width in (inputs, outputs))
    runs = [list(pair) for pair in zip(*pairwise(stops), strict=True)]
    tables = (torch.tensor(table) for table in (*runs, starts[:-1], ups, ranks))
    add_low_rank(y_NO, x_NI, flat, *tables, torch.ones(3))


def optimizer(rng):
    count, store = rng.choice((0, 1, 255, 256, 257, 1000)), rng.choice(list(STORES))
    x, g = numbers(rng, count, dtype=rng.choice(DTYPES)), numbers(rng, count, dtype=rng.choice(DTYPES))
    held = [moment for _, moment in sorted(zero_moments(store, count, x.device).items())]
    adam_(x, g, held, store, rng.choice(("nearest", "stochastic")), 0.9, 0.999, 1e-8, 1e-3, 0.99, rng.getrandbits(31))


def main(rounds, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(rounds):
        torch.set_num_threads(1 + number % 3)
        for operator in (pointwise, drawing, products, attention, updates, optimizer):
            operator(rng)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
