"""All blocks as one operator give what the blocks give one by one."""

import copy
import dataclasses
import math
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satchel.compress.stored import Stored
from satchel.core.book import make
from satchel.core.request import Request, Sampling
from satchel.model.bank import Bank, LowRank, Span
from satchel.model.config import LayerKind
from satchel.model.decoder import Decoder
from satchel.model.forward import logits
from satchel.model.linear import dense_OI, linears, swap
from satchel.model.load import load
from satchel.model.paged import Pool, Row, Stretch
from satchel.model.rope import Rope
from satchel.model.save import save
from satchel.model.source import find_source, load_tokenizer
from satchel.native import levels
from satchel.native import stack as native
from satchel.native.build import compiler
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.model.blocky import blocky
from tests.tolerances import DIVERGENCE, EIGHT_BITS, PERPLEXITY

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

KINDS = ("Q4_1", "Q8_0", "Q4_0", "Q4_K")
FAMILIES = {
    "llama": {},
    "biased": {"model_type": "qwen2"},
    "head norms": {"model_type": "qwen3", "head_dim": 32},
    "window": {"model_type": "mistral", "sliding_window": 21},
    "one head": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 48},
    "scaled embeddings": {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "head_dim": 64},
    "two rotations": {},
}
YARN = Rope(kind="yarn", factor=4.0, context=1024, original_context=256, attention_factor=1.5)
LONG = Rope(kind="longrope", context=1024, original_context=128, short_factor=(1.0,) * 32, long_factor=(3.0,) * 32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    found = {name: blocky(tmp_path_factory.mktemp("m"), KINDS, **changes) for name, changes in FAMILIES.items()}
    kinds = LayerKind(rope=YARN), LayerKind(window=21, rope=LONG), LayerKind(rope=None)
    config = dataclasses.replace(found["two rotations"].config, pattern=kinds)
    return found | {"two rotations": dataclasses.replace(found["two rotations"], config=config)}


def loaded(source, dtype=torch.float32, level="auto") -> Decoder:
    return load(source, dtype, format=Stored(level=level), frozen=True)


@torch.inference_mode()
def steps(
    model: Decoder, lengths: tuple[tuple[int, ...], ...], filler: int = 0, context: int = 512
) -> list[torch.Tensor]:
    """The states of some steps of several sequences, each of which gets `lengths[step][sequence]` tokens."""
    most = -(-sum(max(step) for step in lengths) // 16)
    pool = Pool(model.config, most * len(lengths[0]), model.dtype, "cpu", context)
    pool.data.fill_(torch.nan)
    rng, past, out = torch.Generator().manual_seed(0), [0] * len(lengths[0]), []
    for step in lengths:
        tables = [list(range(s, most * len(step), len(step))) for s in range(len(step))]
        stretches = [Stretch(t, p, n) for t, p, n in zip(tables, past, step, strict=True) if n]
        row = Row(pool.pages, stretches, sum(step) + filler)
        tokens = torch.randint(0, 203, (1, sum(step) + filler), generator=rng)
        out.append(model.hidden(tokens, cache=row)[0, : sum(step)])
        past = [p + n for p, n in zip(past, step, strict=True)]
    return out


def one_by_one(model: Decoder, *how) -> list[torch.Tensor]:
    model._blocks = False
    try:
        return steps(model, *how)
    finally:
        model._blocks = None


@torch.inference_mode()
def test_logits_are_not_rounded_to_the_dtype_of_the_blocks(sources):
    model = loaded(sources["llama"], torch.bfloat16)
    (x_ND,) = steps(model, ((5,),))
    found_NV = logits(model, x_ND)
    assert found_NV.dtype == torch.float32 and x_ND.dtype == torch.bfloat16
    assert not torch.equal(found_NV, found_NV.bfloat16().float())
    assert torch.equal(found_NV.bfloat16(), model.logits(x_ND[None])[0])


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> bool:
    return all(
        (a.float() - b.float()).norm() <= tolerance * b.float().norm() for a, b in zip(ours, theirs, strict=True)
    )


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all steps together, relative."""
    return ((torch.cat(found).float() - torch.cat(exact)).norm() / torch.cat(exact).norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_blocks(sources, family):
    model, halves = loaded(sources[family]), loaded(sources[family], torch.bfloat16)
    lengths = ((40, 3, 0), (1, 1, 1), (2, 20, 1), (1, 0, 60))
    ours, ours_in_16_bits = steps(model, lengths), steps(halves, lengths)
    assert model._blocks and halves._blocks
    exact = one_by_one(model, lengths)
    assert close(ours, exact, EIGHT_BITS)
    assert error(ours_in_16_bits, exact) <= 1.1 * error(one_by_one(halves, lengths), exact) <= 1.1 * EIGHT_BITS


def test_angles_are_those_of_the_longest_sequence_that_there_may_be(sources):
    model, lengths = loaded(sources["two rotations"]), ((40, 3), (1, 1))
    long, short = steps(model, lengths), steps(model, lengths, 0, 64)
    assert model._blocks and not close(short, long, 2 * EIGHT_BITS)
    assert close(short, one_by_one(model, lengths, 0, 64), EIGHT_BITS)
    assert close(steps(model, lengths), long, EIGHT_BITS)


@pytest.mark.parametrize("format", ["stored", "int8", "int8:group=64", "int4", "int4:group=32,symmetric=true"])
def test_a_model_in_16_bits_runs_as_one_operator_in_every_format(format, tmp_path):
    source = blocky(tmp_path, ("BF16",))
    model = load(source, format=make("format", format), frozen=True)
    lengths = ((40, 3, 0), (1, 1, 1), (2, 20, 1), (1, 0, 60))
    ours = steps(model, lengths)
    assert model._blocks
    theirs = one_by_one(model, lengths)
    dense = load(source, torch.float32)
    for path, module in linears(model).items():
        dense.get_submodule(path).weight.data.copy_(dense_OI(module))
    expected = steps(dense, lengths)
    assert close(ours, expected, EIGHT_BITS) and close(theirs, expected, EIGHT_BITS)


def test_a_mixture_of_bfloat16_and_blocks_runs_block_by_block(tmp_path):
    model = load(blocky(tmp_path, ("BF16", "Q4_0")), format=Stored(), frozen=True)
    steps(model, ((3,),))
    assert model._blocks is False


@pytest.mark.slow  # compiles the operator for each
@pytest.mark.parametrize("level", levels.supported())
def test_every_level_gives_the_same(sources, level):
    assert native.kernel(level) is not None
    lengths = ((35, 2), (1, 1), (4, 5))
    dense = load(sources["llama"], torch.float32)
    assert close(steps(loaded(sources["llama"], level=level), lengths), steps(dense, lengths), 2 * EIGHT_BITS)


def test_embeddings_that_lie_in_no_tiles_are_looked_up_before(sources):
    model, lengths = loaded(sources["llama"]), ((40, 3), (1, 1))
    whole = steps(model, lengths)
    weight_VD = model.lm_head.dense()
    swap(model, "model.embed_tokens", torch.nn.Embedding.from_pretrained(weight_VD))
    again = steps(model, lengths)
    assert model._blocks and model._blocks.embeddings is None
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


@pytest.mark.parametrize("token", [-1, 203])
@torch.inference_mode()
def test_a_token_without_an_embedding_is_an_error_that_leaves_the_pages_alone(sources, token):
    model = loaded(sources["llama"])
    pool = Pool(model.config, 1, model.dtype, "cpu", 512)
    pool.data.fill_(7.0)
    with pytest.raises(IndexError, match="203 embeddings"):
        model.hidden(torch.tensor([[5, token]]), cache=Row(pool.pages, [Stretch([0], 0, 2)]))
    assert bool((pool.data == 7).all())


@given(
    lengths=st.lists(st.tuples(*[st.integers(0, 37)] * 3).filter(any), min_size=1, max_size=4).map(tuple),
    filler=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_any_mixture_of_prompts_and_answers(sources, lengths, filler):
    model = loaded(sources["llama"])
    assert close(steps(model, lengths, filler), one_by_one(model, lengths, filler), EIGHT_BITS)


@pytest.mark.parametrize("family", ["llama", "window"])
@torch.inference_mode()
def test_a_tree_of_guesses_is_that_of_the_blocks(sources, family):
    model, parents = loaded(sources[family]), [-1, -1, 0, 1, 1, 4, 2, 5, 5]
    tokens, found = torch.randint(0, 203, (1, 30 + 2 + len(parents)), generator=torch.Generator().manual_seed(0)), []
    for blocks in (None, False):
        model._blocks = blocks
        pool = Pool(model.config, 6, model.dtype, "cpu", 512)
        pool.data.fill_(torch.nan)
        model.hidden(tokens[:, :30], cache=Row(pool.pages, [Stretch([3, 0, 4], 0, 30)]))
        row = Row(pool.pages, [Stretch([5], 0, 1), Stretch([3, 0, 4], 30, 1 + len(parents), parents)])
        found.append(model.hidden(tokens[:, 30:], cache=row)[0])
    model._blocks = None
    assert close(found[:1], found[1:], EIGHT_BITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 40, 1100])  # the keys of the last come in chunks, which threads share
def test_the_number_of_threads_changes_nothing(sources, rows, dtype):
    model, threads = loaded(sources["llama"], dtype), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(steps(model, ((rows, 1), (1, 1), (1, 0))))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_whatever_stands_between_is_run(sources):
    model, lengths = loaded(sources["llama"]), ((5,), (1,))
    whole = steps(model, lengths)
    changed = model.layers[1].mlp
    swap(model, "model.layers.1.mlp", torch.nn.Identity())
    assert not close(steps(model, lengths), whole, 10 * EIGHT_BITS) and not model._blocks
    swap(model, "model.layers.1.mlp", changed)
    model._blocks = None
    seen = []
    hook = model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert close(steps(model, lengths), whole, EIGHT_BITS) and len(seen) == 2
    hook.remove()


def test_rows_with_an_adapter_run_block_by_block_and_others_as_one(sources):
    model = loaded(sources["llama"])
    data, lengths = torch.zeros(1 << 14), ((5,), (1,))
    plain, bank = steps(model, lengths), Bank(model, data)
    again = steps(model, lengths)
    assert model._blocks and all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    path = "model.layers.0.self_attn.q_proj"
    low = LowRank(torch.randn(4, 256), torch.randn(256, 4), 1.0)
    with bank.using([Span(0, 1, bank.store([(path, low)], 0))]):
        assert not close(steps(model, lengths), plain, EIGHT_BITS)
    assert all(torch.equal(a, b) for a, b in zip(steps(model, lengths), plain, strict=True))


def test_a_copy_has_an_operator_of_its_own(sources):
    model = loaded(sources["llama"])
    whole = steps(model, ((4,),))
    other = copy.deepcopy(model)
    other.layers[0].mlp.down_proj.tiles.zero_()
    assert not torch.equal(steps(other, ((4,),))[0], whole[0]) and torch.equal(steps(model, ((4,),))[0], whole[0])


def test_a_state_that_is_no_number_is_told(sources):
    model = loaded(sources["llama"])
    with torch.no_grad():
        model.layers[1].input_layernorm.weight[7] = torch.nan
    engine = Engine(model, Limits(blocks=8, batch=2, step_tokens=64, context=64))
    engine.submit(Request(prompt=(1, 2, 3), max_tokens=4, sampling=Sampling(temperature=0)))
    assert "no numbers" in engine.run()[-1].error


@pytest.mark.slow
@pytest.mark.parametrize("format", ["the file's blocks", "stored", "int8", "int4", "int4:group=32,symmetric=true"])
@torch.inference_mode()
def test_perplexity_of_the_demo_model_is_that_of_its_unpacked_weights(format, tmp_path):
    """On 16,384 tokens; docs/NATIVE.md has what this prints."""
    source = find_source("demo")
    text = load_tokenizer(source).encode("\n\n".join(topics[name] for name in sorted(topics)))
    if format != "the file's blocks":  # in 16 bits
        save(load(source), tmp_path)
        source = find_source(str(tmp_path))
    model = load(
        source, torch.bfloat16, format=make("format", format.replace("the file's blocks", "stored")), frozen=True
    )
    dense = load(source, torch.float32)
    for path, module in linears(model).items():
        dense.get_submodule(path).weight.data.copy_(module.dense(torch.float32))
    errors = {512: [], 31: []}  # by rows a step: of the mean loss, and the divergence
    for start in range(0, 16_384, 2048):
        ids = text[4 * start : 4 * start + 2048]
        expected_NV = dense(torch.tensor([ids]))[0].log_softmax(-1)
        for rows, found in errors.items():
            found_NV = in_steps(model, ids, rows).float().log_softmax(-1)
            divergence = (expected_NV.exp() * (expected_NV - found_NV)).sum(-1).mean()
            found.append((nll(found_NV, ids) - nll(expected_NV, ids), divergence.item()))
    for rows, found in errors.items():
        loss, divergence = (sum(values) / len(values) for values in zip(*found, strict=True))
        print(f"{format}, {rows} rows a step: perplexity {math.expm1(loss):+.2%}, KL {divergence:.5f}")
        assert abs(math.expm1(loss)) <= PERPLEXITY and divergence <= DIVERGENCE


def in_steps(model, ids: list[int], rows: int) -> torch.Tensor:
    pool, states = Pool(model.config, 128, model.dtype, "cpu", 2048), []
    for start in range(0, len(ids), rows):
        some = ids[start : start + rows]
        row = Row(pool.pages, [Stretch(range(128), start, len(some))])
        states.append(model.hidden(torch.tensor([some]), cache=row)[0])
    return torch.cat([model.logits(x) for x in states])


def nll(logits_NV: torch.Tensor, ids: list[int]) -> float:
    return torch.nn.functional.cross_entropy(logits_NV[:-1], torch.tensor(ids[1:])).item()
