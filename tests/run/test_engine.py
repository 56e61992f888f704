"""Answers depend on their request alone: not on company, cuts, reuse, preemption or order."""

import random

import pytest
import torch

from satchel.core.errors import UserError
from satchel.core.request import Request, Sampling
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.run.toys import VOCABULARY, CharTokenizer, toy_decoder

DRAWN = Sampling(temperature=1.0, top_p=0.9, seed=5)
HEATED = Sampling(temperature=1.5, repetition_penalty=1.3, frequency_penalty=0.5, seed=9)


class Chars(CharTokenizer):
    def decode(self, ids, skip_special=True):
        return super().decode(ids)


@pytest.fixture(scope="module")
def model():
    return toy_decoder()


def engine(model, **limits):
    return Engine(model, Limits(**({"blocks": 64, "batch": 8, "step_tokens": 64, "context": 256} | limits)), Chars())


def prompts(count, seed=0, longest=60):
    rng = random.Random(seed)
    return [tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def answers(served, requests):
    """Tokens of each request's answers, all submitted at once."""
    ids = [served.submit(request) for request in requests]
    return gathered(served, served.run(), ids)


def gathered(served, events, ids):
    said = {}
    for event in events:
        said.setdefault((event.id, event.index), []).extend(event.tokens)
    served.check_integrity()
    assert served.idle and served.stats()["blocks_held"] == 0
    ends = [event.id for event in events if event.usage]
    assert sorted(ends) == sorted(ids)
    return [[said[key] for key in sorted(said) if key[0] == id] for id in ids]


def alone(model, request):
    return answers(engine(model), [request])[0]


def greedily(model, prompt, count):
    """One forward pass over everything for each token."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_greedy_answer_is_the_models(model):
    for prompt in prompts(3):
        assert alone(model, Request(prompt=prompt, max_tokens=12)) == [greedily(model, prompt, 12)]


@pytest.mark.parametrize("how", [Sampling(), DRAWN, HEATED])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"step_tokens": 8},  # prompts in parts
        {"blocks": 12},  # preemption
        {"batch": 3, "step_tokens": 3, "blocks": 6},
    ],
)
def test_an_answer_is_the_same_alone_and_in_any_company(model, how, limits):
    requests = [Request(prompt=prompt, max_tokens=5 + i % 60, sampling=how) for i, prompt in enumerate(prompts(14))]
    served = engine(model, **limits)
    assert answers(served, requests) == [alone(model, request) for request in requests]
    assert served.stats()["preemptions"] > 0 or "blocks" not in limits


def test_a_known_beginning_is_not_computed_again_and_changes_nothing(model):
    served, (prompt,) = engine(model), prompts(1, longest=1)
    prompt = (prompt * 70)[:70]
    request = Request(prompt=prompt, max_tokens=20)
    first = answers(served, [request])
    before = served.stats()["tokens"]
    id = served.submit(request)
    events = served.run()
    assert gathered(served, events, [id]) == first
    assert events[-1].usage.cached_tokens == 64
    assert served.stats()["tokens"] - before == 70 - 64 + 19
    other = Request(prompt=prompt[:40] + (5,) * 30, max_tokens=20)
    assert answers(served, [other])[0] == alone(model, other)
    assert served.stats()["reused"] == 64 + 32


def test_many_answers_share_the_prompts_blocks_and_are_those_of_one_by_one(model):
    served = engine(model)
    request = Request(prompt=prompts(1)[0] + (7,) * 30, max_tokens=20, n=5, sampling=DRAWN)
    id = served.submit(request)
    events = served.step()
    while served.stats()["running"] < 5:
        events += served.step()
    held = served.stats()["blocks_held"]
    assert held <= len(request.prompt) // 16 + 5
    (said,) = gathered(served, events + served.run(), [id])
    assert len(said) == 5 and len({tuple(tokens) for tokens in said}) > 1
    assert answers(engine(model, blocks=16, batch=2), [request]) == [said]


def test_the_best_of_many_answers_are_the_likeliest(model):
    prompt = prompts(1)[0]
    drawn = Sampling(temperature=2.0, seed=3)
    served = engine(model)
    all_of_them = {}
    served.submit(Request(prompt=prompt, max_tokens=6, n=6, logprobs=0, sampling=drawn))
    for event in served.run():
        all_of_them.setdefault(event.index, []).extend(zip(event.tokens, event.logprobs, strict=True))
    rated = sorted(all_of_them.values(), key=lambda said: -sum(found.logprob for _, found in said) / len(said))
    best = answers(served, [Request(prompt=prompt, max_tokens=6, n=2, best_of=6, sampling=drawn)])[0]
    assert best == [[token for token, _ in said] for said in rated[:2]]


def test_logprobs_are_the_models(model):
    prompt = prompts(1)[0]
    served = engine(model, step_tokens=7)
    served.submit(Request(prompt=prompt, max_tokens=4, logprobs=3, prompt_logprobs=True))
    events = served.run()
    said = [token for event in events for token in event.tokens]
    noted = [*events[0].prompt_logprobs, *(logprob for event in events for logprob in event.logprobs)]
    with torch.no_grad():
        expected_TV = model(torch.tensor([[*prompt, *said]]))[0].log_softmax(-1)
    assert noted[0] is None and len(noted) == len(prompt) + 4
    for at, (token, found) in enumerate(zip([*prompt, *said][1:], noted[1:], strict=True)):
        assert found.token == token
        assert found.logprob == pytest.approx(float(expected_TV[at, token]), abs=1e-4)
        assert [t for t, _ in found.top] == expected_TV[at].topk(3).indices.tolist()


def test_answers_end_at_stop_tokens_and_stop_texts(model):
    prompt = prompts(1)[0]
    (said,) = alone(model, Request(prompt=prompt, max_tokens=30))
    text = Chars().decode(said)
    served = engine(model)
    served.submit(Request(prompt=prompt, max_tokens=30, stop_tokens=(said[6],)))
    events = served.run()
    assert [t for e in events for t in e.tokens] == said[: said.index(said[6]) + 1]
    assert events[-1].finish == "stop" and events[-1].stopped_by == said[6]
    served.submit(Request(prompt=prompt, max_tokens=30, stop=(text[5:8], "never")))
    events = served.run()
    assert "".join(e.text for e in events) == text[: text.index(text[5:8])]
    assert events[-1].finish == "stop" and events[-1].stopped_by == text[5:8]


def test_text_of_the_events_is_that_of_the_tokens(model):
    served = engine(model)
    served.submit(Request(prompt=prompts(1)[0], max_tokens=30, stop=("\x00never",)))
    events = served.run()
    assert "".join(e.text for e in events) == Chars().decode([t for e in events for t in e.tokens])
    assert events[-1].finish == "length" and events[-1].usage.completion_tokens == 30


def test_a_cancelled_request_says_so_once_and_leaves_nothing(model):
    served = engine(model)
    a, b = (served.submit(Request(prompt=p, max_tokens=50, n=2)) for p in prompts(2))
    served.step()
    events = served.cancel(a)
    assert {e.finish for e in events} == {"cancelled"} and sum(bool(e.usage) for e in events) == 1
    assert served.cancel(a) == [] and served.cancel(77) == []
    served.check_integrity()
    rest = served.run()
    assert {e.id for e in rest} == {b}
    served.check_integrity()
    assert served.stats()["blocks_held"] == 0


def test_a_deadline_ends_an_answer(model):
    now = [0.0]
    served = Engine(model, Limits(blocks=64, context=256), clock=lambda: now[0])
    id = served.submit(Request(prompt=(5, 6), max_tokens=100, deadline_s=3.0))
    while served.step():
        now[0] += 1
    served.check_integrity()
    assert served.idle
    id = served.submit(Request(prompt=(5, 6), max_tokens=100, deadline_s=3.0))
    now[0] += 3
    (event,) = served.step()
    assert event.finish == "deadline" and event.id == id and event.usage.completion_tokens == 0


def test_logits_that_are_no_numbers_end_that_request_only(model):
    broken = toy_decoder()
    with torch.no_grad():
        broken.model.embed_tokens.weight.data[9] = float("nan")
    broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    served, other = engine(broken), Request(prompt=(5, 8), max_tokens=3)
    alone = answers(engine(broken), [other])
    a, b = served.submit(Request(prompt=(5, 9), max_tokens=3)), served.submit(other)
    events = served.run()
    finished = {e.id: e for e in events if e.finish}
    assert finished[a].finish == "error" and "no numbers" in finished[a].error
    assert finished[b].finish == "length" and gathered(served, events, [a, b])[1] == alone[0]


class OnlyEven:
    """A constraint: even tokens, rising, up to 30."""

    def __init__(self):
        self.last = 2

    def allowed(self):
        return list(range(self.last + 2 - self.last % 2, 31, 2))

    def advance(self, token):
        assert token in self.allowed()
        self.last = token


def test_a_constraint_is_kept_and_ends_the_answer_when_nothing_is_left(model):
    served = engine(model)
    (said,) = answers(served, [Request(prompt=(5, 6), max_tokens=50, constraint=OnlyEven, sampling=HEATED)])[0]
    assert said == sorted(set(said)) and all(t % 2 == 0 and t <= 30 for t in said) and said[-1] > 28


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (Request(prompt=(5,) * 200, max_tokens=100), "make 300; this engine takes 256"),
        (Request(prompt=(5,) * 100, max_tokens=100), "need 13 blocks of 16 and the pool has 8"),
        (Request(prompt=(5, VOCABULARY), max_tokens=2), f"token {VOCABULARY} is not among the model's {VOCABULARY}"),
        (Request(prompt=(5,), max_tokens=2, sampling=Sampling(logit_bias={-1: 1.0})), "logit_bias: token -1"),
        (Request(prompt=(5,), max_tokens=2, adapter="x"), "no adapter 'x'"),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(model, request_, complaint):
    served = engine(model, blocks=8)
    with pytest.raises(UserError, match=complaint):
        served.submit(request_)
    assert served.idle


@pytest.mark.parametrize(
    "fields", [{"prompt": ()}, {"max_tokens": 0}, {"n": 0}, {"n": 3, "best_of": 2}, {"stop": ("",)}]
)
def test_malformed_requests_are_refused(fields):
    with pytest.raises(UserError, match="request: "):
        Request(**({"prompt": (1,)} | fields))


@pytest.mark.parametrize(
    "fields", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -1}, {"logit_bias": {3: float("nan")}}]
)
def test_malformed_sampling_is_refused(fields):
    with pytest.raises(UserError, match=f"sampling: {next(iter(fields))}"):
        Sampling(**fields)


def test_the_prompts_logarithms_come_with_the_first_of_the_best(model):
    served = engine(model)
    drawn = Sampling(temperature=2.0, seed=8)
    served.submit(Request(prompt=(5, 6, 7), max_tokens=4, n=2, best_of=5, sampling=drawn, prompt_logprobs=True))
    first, second = served.run()
    assert len(first.prompt_logprobs) == 3 and not second.prompt_logprobs
