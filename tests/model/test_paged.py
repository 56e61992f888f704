"""Attention over pages equals attention over the whole past, however the tokens arrive and whatever the company."""

import pytest
import torch

from satchel.core.book import entries
from satchel.model import spans
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.kv import kv_of, parts_of, token_bytes
from satchel.model.paged import PAGE, Pages, Pool, Row, Stretch, ancestry, sights
from satchel.native import levels
from satchel.native import paged as native
from tests.model.families import SHAPE
from tests.tolerances import TOLERANCE, TWICE_ROUNDED, same

FAMILIES = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {"model_type": "gemma2", "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gpt_neox": {"model_type": "gpt_neox"},
}
LAYER = {"model_type": "llama", "num_hidden_layers": 1}
RNG = torch.Generator().manual_seed(0)
PASTS, NEW = (0, 37, 200, 5, 15), (19, 1, 3, 1, 1)  # of five sequences
TREES = (19, 6, 30, 7, 2)  # guesses after them; those of the first are one chain
PARENTS = [[int(torch.randint(-1, i, (), generator=RNG)) for i in range(count)] for count in TREES]
PARENTS[0] = list(range(-1, 18))
KVS = ["none", *(entry.name for entry in entries() if entry.slot == "kv")]
kvs = pytest.mark.parametrize("kv", KVS)


def kept(kv, x):
    """What is left of numbers that were stored."""
    return kv_of(kv).decode(kv_of(kv).encode(x), torch.float64)


def empty(blocks, kv_heads, dim, dtype, kv="none"):
    """Keys and values of one layer, [blocks, 2, K, X]: nobody knows what is in them."""
    numbers = PAGE * token_bytes(kv_of(kv), dim, dtype) // dtype.itemsize
    return torch.full((blocks, 2, kv_heads, numbers), torch.nan, dtype=dtype)


def problem(dtype, heads=6, kv_heads=2, dim=24, new_tokens=NEW, kv="none"):
    """New queries, keys and values in fused layout, and a pool that holds the pasts."""
    count = sum(new_tokens)
    q, k, v = (torch.randn(count, h * dim, generator=RNG).to(dtype) for h in (heads, kv_heads, kv_heads))
    sizes = [-(-(past + new) // PAGE) for past, new in zip(PASTS, new_tokens, strict=True)]
    order = torch.randperm(sum(sizes) + 2, generator=RNG)
    pages_M, data = order[: sum(sizes)].to(torch.int32), empty(len(order), kv_heads, dim, dtype, kv)
    pasts = [torch.randn(2, past, kv_heads, dim, generator=RNG).to(dtype) for past in PASTS]
    keys = [part.unflatten(-1, (-1, PAGE)) for part in parts_of(kv_of(kv), data[:, 0], dim)]
    values = [part.unflatten(-1, (PAGE, -1)) for part in parts_of(kv_of(kv), data[:, 1], dim)]
    starts, firsts, first, start = [], [], 0, 0
    for past, new, size, (pk, pv) in zip(PASTS, new_tokens, sizes, pasts, strict=True):
        starts.append(start), firsts.append(first)
        for t in range(past):
            block = pages_M[start + t // PAGE]
            for part, stored in zip(keys, kv_of(kv).encode(pk[t]), strict=True):
                part[block, ..., t % PAGE] = stored
            for part, stored in zip(values, kv_of(kv).encode(pv[t]), strict=True):
                part[block, :, t % PAGE] = stored
        start, first = start + size, first + new
    stops = [f + n for f, n in zip(firsts, new_tokens, strict=True)]
    bounds = torch.tensor([starts, firsts, PASTS, stops], dtype=torch.int32)
    shaped = (q.unflatten(1, (heads, dim)), k.unflatten(1, (kv_heads, dim)), v.unflatten(1, (kv_heads, dim)))
    return shaped, data, pages_M, bounds, pasts


def plainly(q, k, v, pasts, window, cap, scale=0.3, kv="none"):
    """One query at a time, in float64."""
    out, row, (k, v), pasts = [], 0, (kept(kv, k), kept(kv, v)), [kept(kv, past) for past in pasts]
    for past, new, (pk, pv) in zip(PASTS, NEW, pasts, strict=True):
        keys, values = torch.cat([pk, k[row : row + new]]).double(), torch.cat([pv, v[row : row + new]]).double()
        for t in range(new):
            seen = slice(max(0, past + t + 1 - (window or 10**9)), past + t + 1)
            groups = q.shape[1] // k.shape[1]
            ks, vs = (x[seen].repeat_interleave(groups, 1) for x in (keys, values))
            score = torch.einsum("he,she->hs", q[row + t].double(), ks) * scale
            score = cap * (score / cap).tanh() if cap else score
            out.append(torch.einsum("hs,she->he", score.softmax(1), vs))
        row += new
    return torch.stack(out)


def seen_by(parents=((),) * 5, new_tokens=NEW):
    stretches = [Stretch((), past, new, tree) for past, new, tree in zip(PASTS, new_tokens, parents, strict=True)]
    return torch.tensor(sights(stretches))


def attended(path, shaped, data, pages_M, bounds, window=0, cap=0.0, sight=None, kv="none"):
    sight = seen_by() if sight is None else sight
    if path == "native":
        keys, values = data[:, 0], data[:, 1]
        return torch.ops.satchel.paged_attention(
            *shaped, keys, values, pages_M, bounds, sight, 0.3, window, cap, kv_of(kv).kernel
        )
    row = in_torch(shaped, data, pages_M, bounds, sight, kv)
    return row.layers[0].attend(*(t[None] for t in shaped), scale=0.3, window=window, cap=cap)[0]


def in_torch(shaped, data, pages_M, bounds, sight, kv="none"):
    """The row as torch attends, over pages of one layer."""
    (count, *_, dim), kv_heads = shaped[0].shape, shaped[1].shape[1]
    config = ModelConfig.from_hf(
        SHAPE | LAYER | {"num_attention_heads": kv_heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    )
    stretches = [Stretch(pages_M[start:].tolist(), past, stop - at) for start, at, past, stop in bounds.T.tolist()]
    tiles = spans.cut(stretches)
    shape = spans.fitting(tiles, count)
    numbers = torch.tensor(spans.laid(shape, tiles, stretches, sight.tolist()))
    return spans.Spans(Pages(data.flatten(1), config, 0, kv), shape, numbers)


@pytest.fixture(params=["native", "torch"])
def path(request):
    if request.param == "native" and native.library() is None:
        pytest.skip("needs a C++ compiler")
    return request.param


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (20, 0.0), (0, 2.0), (7, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kvs
def test_every_query_sees_its_own_past(path, dtype, window, cap, kv):
    shaped, data, pages_M, bounds, pasts = problem(dtype, kv=kv)
    out = attended(path, shaped, data, pages_M, bounds, window, cap, kv=kv)
    assert same(out, plainly(*shaped, pasts, window, cap, kv=kv).to(dtype))


def by_branch(q, k, v, pasts, window, cap, scale=0.3, kv="none"):
    """One query at a time, in float64: a guess sees what came before the tree, and its own branch."""
    out, row, (k, v), pasts = [], 0, (kept(kv, k), kept(kv, v)), [kept(kv, past) for past in pasts]
    for certain, tree, (pk, pv) in zip(NEW, PARENTS, pasts, strict=True):
        stop = row + certain
        for t in range(certain + len(tree)):
            guess, branch = t - certain, []
            while guess >= 0:
                branch.append(stop + guess)
                guess = tree[guess]
            rows = [*range(row, min(row + t + 1, stop)), *branch[::-1]]
            ks, vs = (torch.cat([old, new[rows]]).double()[-(window or 10**9) :] for old, new in ((pk, k), (pv, v)))
            ks, vs = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (ks, vs))
            score = torch.einsum("he,she->hs", q[row + t].double(), ks) * scale
            score = cap * (score / cap).tanh() if cap else score
            out.append(torch.einsum("hs,she->he", score.softmax(1), vs))
        row = stop + len(tree)
    return torch.stack(out)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (20, 0.0), (0, 2.0), (2, 2.0), (1, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 24), (9, 3, 64)])
@kvs
def test_a_guess_sees_its_own_branch(path, dtype, window, cap, heads, kv_heads, dim, kv):
    """Trees that begin within a page and end beyond it, as deep as a window and deeper."""
    new = tuple(certain + guesses for certain, guesses in zip(NEW, TREES, strict=True))
    shaped, data, pages_M, bounds, pasts = problem(dtype, heads, kv_heads, dim, new, kv)
    out = attended(path, shaped, data, pages_M, bounds, window, cap, seen_by(PARENTS, new), kv)
    assert same(out, by_branch(*shaped, pasts, window, cap, kv=kv).to(dtype))


def test_a_chain_is_seen_as_tokens_that_are_certain(path):
    shaped, data, pages_M, bounds, _ = problem(torch.float32)
    chains = [range(-1, new - 1) for new in NEW]
    plain = attended(path, shaped, data.clone(), pages_M, bounds)
    assert same(attended(path, shaped, data, pages_M, bounds, sight=seen_by(chains)), plain)


def test_a_tree_of_which_a_part_is_cached_goes_on_where_it_stood():
    parents = [-1, -1, 0, 1, 1, 2]
    whole, late = (sights([Stretch((), past, new, parents)]) for past, new in ((30, 6), (33, 3)))
    assert [row[3:] for row in whole] == late
    assert whole[0] == [30] * 6 and whole[2] == [30, 30, 31, 31, 31, 32]
    assert ancestry(parents) == whole[1] == [1, 2, 0b101, 0b1010, 0b10010, 0b100101]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 8, 16), (4, 1, 40), (5, 1, 128), (40, 1, 96)])
@kvs
def test_heads_of_any_shape(path, heads, kv_heads, dim, dtype, kv):
    shaped, data, pages_M, bounds, pasts = problem(dtype, heads, kv_heads, dim, kv=kv)
    out = attended(path, shaped, data, pages_M, bounds, kv=kv)
    assert same(out, plainly(*shaped, pasts, 0, 0.0, kv=kv).to(dtype))


@pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 1e-40])
@kvs
def test_both_paths_store_the_same(dtype, size, kv):
    (q, k, v), data, pages_M, bounds, _ = problem(dtype, 9, 3, 64, kv=kv)
    k[2, 1, 5], k[3, 0, 7], v[4, 2, 1], v[0] = torch.nan, torch.inf, -torch.inf, 0.0
    stored = [data.clone(), data.clone()]
    for path, into in zip(("native", "torch"), stored, strict=True):
        attended(path, (q, k * size, v * size), into, pages_M, bounds, kv=kv)
    pages = (parts_of(kv_of(kv), data, 64) for data in stored)
    for ours, theirs in zip(*pages, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("window", "cap", "kv"), [(0, 0.0, "none"), (20, 2.0, "none"), (0, 0.0, "int8")])
def test_in_bfloat16_only_shares_and_results_are_rounded(window, cap, kv):
    shaped, data, pages_M, bounds, pasts = problem(torch.bfloat16, 9, 3, 64, kv=kv)
    exact = plainly(*shaped, pasts, window, cap, kv=kv)
    found = attended("native", shaped, data, pages_M, bounds, window, cap, kv=kv).double()
    assert (found - exact).norm() <= TWICE_ROUNDED * exact.norm()


@pytest.mark.slow  # compiles the kernel for each
@pytest.mark.parametrize("level", levels.supported())
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (20, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kvs
def test_every_level_gives_the_same(monkeypatch, level, dtype, window, cap, kv):
    kernel = native.library(level)
    assert kernel is not None
    monkeypatch.setattr(native, "library", lambda: kernel)
    shaped, data, pages_M, bounds, pasts = problem(dtype, 9, 3, 64, kv=kv)
    out = attended("native", shaped, data, pages_M, bounds, window, cap, kv=kv)
    assert same(out, plainly(*shaped, pasts, window, cap, kv=kv).to(dtype))


@pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 700])
@kvs
def test_keys_of_several_chunks_are_all_seen_once(monkeypatch, dtype, window, kv):
    monkeypatch.setitem(globals(), "PASTS", (0, 37, 1300, 5, 600))
    shaped, data, pages_M, bounds, pasts = problem(dtype, 9, 3, 64, kv=kv)
    shaped[0][22] *= 8  # its highest scores lie in any of the chunks
    out = attended("native", shaped, data, pages_M, bounds, window, kv=kv)
    assert same(out, plainly(*shaped, pasts, window, 0.0, kv=kv).to(dtype))


@pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 700])
@kvs
def test_the_kernels_bits_do_not_depend_on_company_cuts_or_threads(dtype, window, kv):
    rng = torch.Generator().manual_seed(1)
    count, dim = 1100, 96  # keys of three chunks
    q, k, v = (torch.randn(count, h, dim, generator=rng).to(dtype) for h in (6, 2, 2))

    def run(cuts, company, threads):
        data, outs, at = empty(80, 2, dim, dtype, kv), [], 0
        table = torch.randperm(75, generator=rng).to(torch.int32)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for cut in cuts:
            mine = [t[at : at + cut] for t in (q, k, v)]
            others = [torch.randn(3, t.shape[1], dim, generator=rng).to(dtype) for t in mine] if company else []
            shaped = [torch.cat([t, other]) for t, other in zip(mine, others, strict=True)] if company else mine
            used = -(-(at + cut) // PAGE)
            pages = torch.cat([table[:used], torch.tensor([78], dtype=torch.int32)])
            bounds = torch.tensor([[0, used], [0, cut], [at, 0], [cut, cut + 3]], dtype=torch.int32)
            bounds = bounds if company else bounds[:, :1].contiguous()
            stretches = [Stretch((), at, cut), Stretch((), 0, 3)][: bounds.shape[1]]
            sight = torch.tensor(sights(stretches))
            outs.append(attended("native", shaped, data, pages, bounds, window, sight=sight, kv=kv)[:cut])
            at += cut
        torch.set_num_threads(before)
        return torch.cat(outs)

    whole = run([count], False, 1)
    assert torch.equal(run([count], True, 2), whole)
    assert torch.equal(run([1] * count, False, 2), whole)
    assert torch.equal(run([17, 500, 3, 128, 152, 299, 1], True, 3), whole)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_of_sequences_gives_the_logits_of_each_alone(family):
    decoder = Decoder(ModelConfig.from_hf(SHAPE | FAMILIES[family]))
    decoder.init_weights(torch.Generator().manual_seed(1), std=0.2)
    decoder.eval()
    pool = Pool(decoder.config, 8, torch.float32)
    a, b = torch.randint(0, 101, (2, 23), generator=RNG)
    tables, logits = ([3, 1], [0, 5]), {0: [], 1: []}
    for (begin_a, end_a), (begin_b, end_b) in (((0, 9), (0, 20)), ((9, 10), (20, 21)), ((10, 23), (21, 23))):
        row = Row(
            pool.pages, [Stretch(tables[0], begin_a, end_a - begin_a), Stretch(tables[1], begin_b, end_b - begin_b)], 40
        )
        tokens = torch.cat([a[begin_a:end_a], b[begin_b:end_b], torch.zeros(row.filler, dtype=torch.int64)])
        out = decoder(tokens[None], cache=row)[0]
        logits[0].append(out[: end_a - begin_a]), logits[1].append(out[end_a - begin_a :][: end_b - begin_b])
    for tokens, parts in zip((a, b), logits.values(), strict=True):
        expected = decoder(tokens[None])[0]
        assert (torch.cat(parts) - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_tree_gives_the_logits_of_each_branch_and_goes_on_from_the_kept_one(family):
    """Rotary and learned positions count the branch; what is gathered is as if the branch alone had been run."""
    decoder = Decoder(ModelConfig.from_hf(SHAPE | FAMILIES[family]))
    decoder.init_weights(torch.Generator().manual_seed(1), std=0.2)
    decoder.eval()
    pool, table, past = Pool(decoder.config, 8, torch.float32), [3, 1, 6], 14
    pool.data.fill_(torch.nan)
    parents, branch = [-1, -1, 0, 1, 1, 4, 2, 5], [1, 4, 5, 7]
    text, guesses, after = (torch.randint(0, 101, (n,), generator=RNG) for n in (past + 1, len(parents), 3))

    def run(begin, tokens, tree=()):
        return decoder(tokens[None], cache=Row(pool.pages, [Stretch(table, begin, len(tokens), tree)]))[0]

    run(0, text[:past])
    out = run(past, torch.cat([text[past:], guesses]), parents)[1:]
    for number in range(len(parents)):
        path, at = [], number
        while at >= 0:
            path, at = [at, *path], parents[at]
        expected = decoder(torch.cat([text, guesses[path]])[None])[0, -1]
        assert (out[number] - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()
    pool.gather(table, past + 1, branch)
    out = run(past + 1 + len(branch), after)
    expected = decoder(torch.cat([text, guesses[branch], after])[None])[0, -len(after) :]
    assert (out - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


@kvs
def test_gathered_tokens_take_both_models_keys_along_and_leave_the_others_alone(kv):
    config = ModelConfig.from_hf(SHAPE | {"model_type": "llama"})
    pool = Pool(config, 6, torch.float32, beside=config, kv=kv)
    pool.data.view(torch.uint8).random_(generator=RNG)
    before, table, right = pool.data.clone(), [4, 0, 2], [0, 3, 4, 9, 20]
    old, first = {}, 13
    for pages in (pool.pages, pool.beside):
        old[pages] = [slot_of(pages, table, first + slot).clone() for slot in right]
    pool.gather(table, first, right)
    for pages in (pool.pages, pool.beside):
        for number, tensor in enumerate(old[pages]):
            assert torch.equal(slot_of(pages, table, first + number), tensor)
    fixed = [slot for slot in range(3 * PAGE) if not first + 1 <= slot < first + 5]
    untouched = Pool(config, 6, torch.float32, beside=config, kv=kv)
    untouched.data.copy_(before)
    for ours, theirs in zip((pool.pages, pool.beside), (untouched.pages, untouched.beside), strict=True):
        for slot in fixed:
            assert torch.equal(slot_of(ours, table, slot), slot_of(theirs, table, slot))
    assert torch.equal(pool.data[[1, 3, 5]].view(torch.uint8), before[[1, 3, 5]].view(torch.uint8))


def slot_of(pages, table, slot):
    """The keys and values of one slot in all layers, as bytes."""
    block = pages.data[table[slot // PAGE]]
    keys, values = (parts_of(pages.kv, block[:, half], pages.dim) for half in (0, 1))
    found = [part.unflatten(-1, (-1, PAGE))[..., slot % PAGE] for part in keys]
    found += [part.unflatten(-1, (PAGE, -1))[..., slot % PAGE, :] for part in values]
    return torch.cat([part.contiguous().view(torch.uint8) for part in found], dim=-1)


def test_copied_blocks_are_equal_and_others_untouched():
    pool = Pool(ModelConfig.from_hf(SHAPE | {"model_type": "llama"}), 4, torch.float32)
    pool.data.copy_(torch.randn(pool.data.shape, generator=RNG))
    before = pool.data.clone()
    pool.copy([(0, 2), (2, 3)])
    assert torch.equal(pool.data[2], before[0]) and torch.equal(pool.data[3], before[0])
    assert torch.equal(pool.data[:2], before[:2])
