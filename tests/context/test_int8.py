"""Keys and values in 8 bits: half the memory, nearly the model's answers, the same ones whatever becomes of blocks."""

import math
from pydoc_data.topics import topics

import pytest
import torch

from satchel.context.int8 import Int8
from satchel.core.book import make
from satchel.core.errors import UnknownName
from satchel.core.request import Request
from satchel.core.serve import ServeJob
from satchel.model.config import ModelConfig
from satchel.model.load import load
from satchel.model.paged import PAGE, Pool, Row, Stretch, block_bytes
from satchel.model.source import find_source, load_tokenizer
from satchel.run.capacity import capacity
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.decode.common import DRAWN, GREEDY, some_requests
from tests.decode.drafts import draft, large
from tests.run.served import LLAMA
from tests.run.test_adapters import write_adapter
from tests.tolerances import DIVERGENCE, EIGHT_BITS, PERPLEXITY

RNG = torch.Generator().manual_seed(0)


def test_a_number_is_off_by_half_a_step_at_most():
    x_NKE = torch.randn(50, 3, 64, generator=RNG) * torch.logspace(-30, 30, 50)[:, None, None]
    off = (Int8().decode(Int8().encode(x_NKE), torch.float32) - x_NKE).abs()
    assert (off <= x_NKE.abs().amax(-1, keepdim=True) / 253).all()


def test_what_is_no_number_stays_none_and_what_is_nothing_stays_nothing():
    x_NKE = torch.full((5, 1, 8), 127.0)
    x_NKE[0, 0, 3], x_NKE[1, 0, 0], x_NKE[2], x_NKE[3] = torch.nan, -torch.inf, 0.0, 1e-41
    found = Int8().decode(Int8().encode(x_NKE), torch.float32)
    assert found[:2].isnan().all() and (found[2:4] == 0).all() and torch.equal(found[4], x_NKE[4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_takes_a_byte_a_number_and_two_a_scale(dtype):
    config = ModelConfig.from_hf(LLAMA)
    expected = 2 * config.layers * config.kv_heads * PAGE * (config.head_dim + 2)
    assert block_bytes(config, dtype, "int8") == expected == Pool(config, 3, dtype, kv="int8").block_bytes


def test_a_budget_holds_nearly_twice_the_tokens():
    held = [
        capacity(
            ServeJob(model="x", memory="3GiB", batch=4000, step_tokens=4000, kv=kv), ModelConfig.from_hf(LLAMA), "cpu"
        )
        for kv in ("none", "int8")
    ]
    plain, packed = (each.accounts["kv"] / each.tokens for each in held)
    assert plain / packed == 128 / 66 and held[1].tokens > 1.9 * held[0].tokens


def test_a_kv_that_nobody_knows_is_refused_with_a_suggestion():
    with pytest.raises(UnknownName, match="int8"):
        ServeJob(model="x", kv="int9")


@torch.inference_mode()
def test_states_are_nearly_those_of_exact_keys_and_values():
    model, tokens, found = large().eval(), torch.randint(4, 100, (1, 200), generator=RNG), []
    for kv in ("none", "int8"):
        pool = Pool(model.config, 13, model.dtype, kv=kv)
        found.append(model(tokens, cache=Row(pool.pages, [Stretch(range(13), 0, 200)])))
    assert 0 < (found[1] - found[0]).norm() <= EIGHT_BITS * found[0].norm()


@pytest.fixture(scope="module")
def model():
    return large()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small model that guesses, and an adapter."""
    home = tmp_path_factory.mktemp("home")
    draft(home / "near")
    write_adapter(home / "poet", 4, 1, make_model=large)
    return home


def engine(model, home=None, **how):
    limits = {name: how.pop(name, size) for name, size in (("blocks", 64), ("batch", 6), ("step_tokens", 64))}
    served = Engine(model, Limits(**limits, context=256), kv="int8", **how)
    if home:
        served.register("poet", home / "poet")
    return served


def answers(served, requests):
    ids = [served.submit(request) for request in requests]
    events = served.run()
    served.check_integrity()
    assert not any(event.error for event in events)
    return [[t for e in events if e.id == id for t in e.tokens] for id in ids]


@pytest.fixture(scope="module", params=[GREEDY, DRAWN])
def asked(request, model, home):
    """Requests, and the answer to each alone."""
    beginning = tuple(4 + i % 50 for i in range(37))
    requests = some_requests(request.param, count=5)
    requests += [
        Request(prompt=beginning + (i,), max_tokens=35, sampling=request.param, adapter="poet" if i % 2 else "")
        for i in range(4, 7)
    ]
    return requests, [answers(engine(model, home), [one])[0] for one in requests]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"step_tokens": 7},
        {"blocks": 20},
        {"blocks": 20, "preemption": "fastswitch"},
        {"decoding": "lookup"},
        {"decoding": "draft:model={home}/near,tokens=3", "blocks": 20},
        {"decoding": "rsd:model={home}/near,width=2,depth=3,rule=noise"},
    ],
    ids=str,
)
def test_an_answer_is_the_same_alone_and_whatever_becomes_of_its_blocks(model, home, asked, how):
    requests, expected = asked
    how = {name: value.format(home=home) if isinstance(value, str) else value for name, value in how.items()}
    served = engine(model, home, **how)
    assert answers(served, requests) == expected
    assert answers(served, requests) == expected, "from what the pool has"
    stats = served.stats()
    assert stats["reused"] > 0 and ("blocks" not in how or stats["preemptions"] > 0)
    assert stats["moved_in"] > 0 or "preemption" not in how
    assert stats["right"] > 0 or "decoding" not in how


@pytest.mark.slow
@torch.inference_mode()
def test_perplexity_of_the_demo_model_hardly_changes():
    """On 8,192 tokens: +0.1%, 0.003 nats."""
    source = find_source("demo")
    text = load_tokenizer(source).encode("\n\n".join(topics[name] for name in sorted(topics)))
    model, losses, divergences = load(source, torch.bfloat16, format=make("format", "stored"), frozen=True), [], []
    for start in range(0, 4 * 8192, 4 * 2048):
        ids = text[start : start + 2048]
        plain_NV, packed_NV = (chances(model, ids, kv) for kv in ("none", "int8"))
        losses.append([loss(each, ids) for each in (plain_NV, packed_NV)])
        divergences.append((plain_NV.exp() * (plain_NV - packed_NV)).sum(-1).mean().item())
    plain, packed = (sum(each) / len(each) for each in zip(*losses, strict=True))
    assert abs(math.expm1(packed - plain)) <= PERPLEXITY and sum(divergences) / len(divergences) <= DIVERGENCE


def chances(model, ids, kv):
    """Logarithms of the next token's, in steps of 512."""
    pool, states = Pool(model.config, 128, model.dtype, context=2048, kv=kv), []
    for start in range(0, len(ids), 512):
        row = Row(pool.pages, [Stretch(range(128), start, 512)])
        states.append(model.hidden(torch.tensor([ids[start : start + 512]]), cache=row)[0])
    return torch.cat([model.logits(x) for x in states]).float().log_softmax(-1)


def loss(log_NV, ids):
    return torch.nn.functional.nll_loss(log_NV[:-1], torch.tensor(ids[1:])).item()
