"""A small model guesses, and nothing but the time changes."""

from dataclasses import replace
from itertools import product

import pytest
import tokenizers
import torch

from satchel.core.errors import ModelError, UserError
from satchel.core.request import Request, Sampling
from satchel.core.serve import ServeJob
from satchel.decode.draft import Draft, require_same_tokens
from satchel.model.paged import block_bytes
from satchel.model.source import find_source
from satchel.model.storage import storage
from satchel.model.tokenizer import Tokenizer
from satchel.run.capacity import capacity, rehearse_engine
from tests.decode.common import DRAWN, GREEDY, REPEATED, answers, engine, some_requests
from tests.decode.drafts import draft, large
from tests.run.test_adapters import write_adapter
from tests.run.test_engine_stress import serve_at_random
from tests.tolerances import DEVIATIONS


@pytest.fixture(scope="module")
def model():
    return large()


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    return draft(tmp_path_factory.mktemp("near") / "model")


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    return draft(tmp_path_factory.mktemp("same") / "model", noise=0.0)


@pytest.mark.parametrize("how", [GREEDY, DRAWN, REPEATED])
@pytest.mark.parametrize("limits", [{}, {"blocks": 10}, {"step_tokens": 7}])
def test_guessing_changes_no_answer(model, near, how, limits):
    requests = some_requests(how)
    guessing = engine(model, f"draft:model={near},tokens=5", **limits)
    assert answers(guessing, requests) == answers(engine(model), requests)
    stats = guessing.stats()
    assert 0 < stats["right"] < stats["guessed"] and stats["drafts"] > 0


@pytest.mark.parametrize("how", [GREEDY, DRAWN, REPEATED])
@pytest.mark.parametrize("limits", [{}, {"blocks": 11}, {"step_tokens": 16}])
def test_a_draft_that_is_the_model_is_never_wrong(model, same, how, limits):
    """Its keys and values are where they should be, whatever was reused, shared, preempted or cut."""
    guessing = engine(model, f"draft:model={same},tokens=3", **limits)
    beginning = tuple(4 + i % 50 for i in range(37))
    requests = [Request(prompt=beginning + (i,), max_tokens=45, sampling=how, n=1 + i % 3) for i in range(4, 10)]
    for _ in range(2):  # the second time from what the pool has
        answers(guessing, requests)
    stats = guessing.stats()
    assert stats["right"] == stats["guessed"] > stats["answered"] / 3
    assert stats["preemptions"] > 0 or "blocks" not in limits
    assert stats["reused"] > 0


def test_a_perfect_draft_saves_the_steps_that_it_guesses(model, same):
    guessing = engine(model, f"draft:model={same},tokens=4")
    answers(guessing, [Request(prompt=(5, 6, 7), max_tokens=101)])
    assert guessing.stats()["steps"] == 1 + 100 / 5


def test_drawn_answers_have_the_models_distribution(tmp_path):
    """Three tokens of a vocabulary of eight: all 512 answers, each as often as the model has it."""
    model, how = large(vocab_size=8), Sampling(temperature=1.3, seed=21)
    guessing = engine(
        model, f"draft:model={draft(tmp_path / 'm', noise=0.05, vocab_size=8)}", batch=64, step_tokens=256
    )
    prompt, draws = (1, 2, 3), 3072
    said = [request for i in range(draws // 128) for request in said_by(guessing, prompt, how, seed=i)]
    law = torch.zeros(8, 8, 8)
    with torch.no_grad():
        for pair in product(range(8), repeat=2):
            share_TV = (model(torch.tensor([[*prompt, *pair]]))[0].double() / how.temperature).softmax(-1)
            law[pair] = share_TV[2, pair[0]] * share_TV[3, pair[1]] * share_TV[4]
    expected = law.flatten() * draws
    found = torch.bincount(torch.tensor([64 * a + 8 * b + c for a, b, c in said]), minlength=512)
    often = expected >= 5
    freedom = int(often.sum())
    chi2 = float(((found - expected).square() / expected)[often].sum())
    assert freedom > 150 and chi2 < freedom + DEVIATIONS * (2 * freedom) ** 0.5
    assert 0 < guessing.stats()["right"] < guessing.stats()["guessed"]


def said_by(served, prompt, how, seed):
    how = Sampling(temperature=how.temperature, seed=1000 * how.seed + seed)
    served.submit(Request(prompt=prompt, max_tokens=3, n=128, sampling=how))
    told = {}
    for event in served.run():
        told.setdefault(event.index, []).extend(event.tokens)
    return list(told.values())


def test_random_requests_end_once_and_leave_nothing(tmp_path):
    serve_at_random("priority", "fastswitch:size=1MiB", f"draft:model={draft(tmp_path / 'm')}", 60)


def test_answers_of_adapters_are_guessed_by_the_bare_draft(near, tmp_path):
    """Blocks of keys and values move out of an adapter's way, the draft's with them."""
    folder = write_adapter(tmp_path / "a", 8, 1, make_model=large)
    requests = [replace(request, adapter="a" * (i % 2)) for i, request in enumerate(some_requests(DRAWN))]
    found = []
    for decoding in ("plain", f"draft:model={near}"):
        served = engine(large(), decoding, blocks=24)
        served.register("a", folder)
        ids = [served.submit(request) for request in requests]
        events = served.run()
        served.check_integrity()
        found.append([[t for e in events if e.id == id for t in e.tokens] for id in ids])
    assert found[0] == found[1]
    assert served.stats()["right"] > 0 and served.stats()["adapter_loads"] > 0


def test_a_draft_that_knows_fewer_tokens_guesses_those(model, tmp_path):
    requests = some_requests(DRAWN, count=4)
    guessing = engine(model, f"draft:model={draft(tmp_path / 'm', vocab_size=100)}")
    assert answers(guessing, requests) == answers(engine(model), requests)


def test_logits_that_are_no_numbers_end_the_guessing_only(model, tmp_path):
    requests = some_requests(DRAWN, count=4)
    guessing = engine(model, f"draft:model={draft(tmp_path / 'm', noise=float('nan'))}")
    assert answers(guessing, requests) == answers(engine(model), requests)
    assert guessing.stats()["guessed"] == 0


def test_a_requests_usage_says_what_was_guessed_and_kept(model, near):
    guessing = engine(model, f"draft:model={near}")
    for request in some_requests(GREEDY, count=5):
        guessing.submit(request)
    usages = [event.usage for event in guessing.run() if event.usage]
    stats = guessing.stats()
    assert sum(usage.guessed_tokens for usage in usages) == stats["guessed"] > 0
    assert sum(usage.accepted_tokens for usage in usages) == stats["right"] > 0


@pytest.mark.parametrize("format", ["none", "auto", "int8"])
def test_what_the_draft_takes_is_counted_before_anything_is_loaded(near, format):
    source = find_source(near)
    plain, drafted = ServeJob(model="x"), ServeJob(model="x", decoding=f"draft:model={near},format={format}")
    config = large(hidden_size=64, intermediate_size=128, vocab_size=512).config
    alone, both = (capacity(job.replace(memory="2GiB", batch=4), config, "cpu") for job in (plain, drafted))
    stored = plain.replace(format=storage(format, source, "cpu"))
    extra = rehearse_engine(stored, source.config, "cpu", source)["weights"]
    assert both.accounts["weights"] == alone.accounts["weights"] + extra
    more = block_bytes(source.config, torch.bfloat16) * both.limits.blocks
    assert both.accounts["kv"] == alone.accounts["kv"] + more and both.limits.blocks == alone.limits.blocks


def spoken(*words):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    return Tokenizer(backend, backend.get_vocab_size())


def test_a_draft_of_another_vocabulary_is_refused_with_the_cure():
    require_same_tokens(spoken("a", "b", "c"), spoken("a", "b"), "fewer")
    with pytest.raises(ModelError, match="'other' has another vocabulary: token 1 is 'x' there and 'b' here.*family"):
        require_same_tokens(spoken("a", "b", "c"), spoken("a", "x", "c"), "other")


def test_a_draft_that_knows_too_few_positions_is_refused(model, tmp_path):
    from tests.model.families import hf_model

    hf_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="knows 64 positions and answers may have 256 tokens; serve with context=64"):
        engine(model, f"draft:model={tmp_path / 'gpt2'}")


def test_a_draft_needs_a_model():
    with pytest.raises(UserError, match="draft:model=FOLDER"):
        Draft()
