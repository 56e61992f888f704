"""Adapters of any rank in one row: each run of tokens gets its own, and nothing of the others'."""

import pytest
import torch

from satchel.core.errors import ModelError
from satchel.model.bank import Bank, LowRank, Span, add_in_torch, add_low_rank
from satchel.native import low_rank as native
from tests.run.toys import toy_decoder
from tests.tolerances import same


def adapter(model, rank, seed, only=()):
    rng = torch.Generator().manual_seed(seed)
    maps = {path: m for path, m in model.named_modules() if path.endswith("_proj") and (not only or path in only)}
    return {
        path: LowRank(
            torch.randn(rank + i % 2, m.in_features, generator=rng) * 0.1,
            torch.randn(m.out_features, rank + i % 2, generator=rng) * 0.1,
            0.5 + i,
        )
        for i, (path, m) in enumerate(maps.items())
    }


def merged(low, tokens):
    model = toy_decoder()
    with torch.no_grad():
        for path, one in low.items():
            model.get_submodule(path).weight += one.scale * one.B_OR @ one.A_RI
        return model(tokens)


def banked(dtype=torch.float32, numbers=1 << 16):
    model = toy_decoder().to(dtype)
    return model, Bank(model, torch.full((4, numbers // 4), torch.nan, dtype=dtype))


@pytest.fixture(params=["native", "torch"])
def either_path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("needs a C++ compiler")


@torch.no_grad()
def test_each_run_gets_its_own_adapter(either_path):
    model, bank = banked()
    plain = toy_decoder()
    lows = [
        adapter(plain, 1, 1),
        adapter(plain, 7, 2, only=("model.layers.0.self_attn.q_proj",)),
        adapter(plain, 40, 3),
    ]
    tokens = torch.randint(4, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    spans, start = [], 8
    for low, first, stop in zip(lows, (5, 6, 16), (6, 15, 24), strict=True):
        spans.append(Span(first, stop, bank.store(low.items(), start)))
        start += bank.numbers(low)
    lengths = (5, 1, 9, 1, 8)
    with bank.using(spans):
        found = model(tokens, lengths=lengths)[0].split(lengths)
    parts = tokens[0].split(lengths)
    expected = [plain(parts[0][None]), merged(lows[0], parts[1][None]), merged(lows[1], parts[2][None])]
    expected += [plain(parts[3][None]), merged(lows[2], parts[4][None])]
    for ours, theirs in zip(found, expected, strict=True):
        assert same(ours, theirs[0])
    assert same(model(tokens), plain(tokens))


@pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [40, 64])
def test_the_kernel_does_what_the_torch_path_does_and_rows_do_not_depend_on_each_other(dtype, inputs):
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(20_000, generator=rng).mul_(0.05).to(dtype)
    model, bank = banked(dtype)
    x, y = torch.randn(19, inputs, generator=rng).to(dtype), torch.randn(19, 50, generator=rng).to(dtype)
    table = [torch.tensor(t) for t in ([2, 7, 8], [7, 8, 19], [0, 3000, 9000], [1000, 7000, 15_000], [5, 0, 17])]
    scale = torch.tensor([0.5, 9.0, 2.0])
    ours, theirs = y.clone(), y.clone()
    add_low_rank(ours, x, flat, *table, scale)
    add_in_torch(theirs, x, flat, *table, scale)
    assert same(ours, theirs) and torch.equal(ours[:2], y[:2]) and torch.equal(ours[7], y[7])
    one = y[11:12].clone()
    alone = [torch.tensor([0]), torch.tensor([1]), *(t[2:] for t in table[2:])]
    add_low_rank(one, x[11:12], flat, *alone, scale[2:].contiguous())
    assert torch.equal(one[0], ours[11])


def test_a_map_that_no_bank_is_around_is_refused_by_name():
    model, bank = banked()
    with pytest.raises(ModelError, match="lm_head"):
        bank.numbers({"lm_head": LowRank(torch.zeros(2, 32), torch.zeros(132, 2), 1.0)})
