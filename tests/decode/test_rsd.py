"""A tree of guesses is checked in one pass, and what is said has the large model's distribution."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from satchel.core.errors import UserError
from satchel.core.request import Request, Sampling
from satchel.core.serve_seams import Draft
from satchel.decode.rsd import RSD, Law, conditioned, draw, judge, uniform
from satchel.model.sampling import gumbel, mix, probabilities
from tests.decode.common import DRAWN, GREEDY, REPEATED, answers, engine, some_requests
from tests.decode.drafts import draft, large
from tests.run.test_adapters import write_adapter
from tests.run.test_engine_stress import serve_at_random
from tests.tolerances import DEVIATIONS, TOLERANCE

TREES = {"constant": "branches=3+2+1", "beam": "width=3,depth=4"}
trees = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


@pytest.fixture(scope="module")
def model():
    return large()


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    return draft(tmp_path_factory.mktemp("near") / "model", noise=0.05)


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    return draft(tmp_path_factory.mktemp("same") / "model", noise=0.0)


@trees
@pytest.mark.parametrize("limits", [{}, {"blocks": 9}, {"step_tokens": 16}])
def test_greedy_answers_are_those_of_plain_decoding(model, near, tree, limits):
    requests = some_requests(GREEDY, count=6, tokens=30)
    guessing = engine(model, f"rsd:model={near},{tree}", **limits)
    assert answers(guessing, requests) == answers(engine(model), requests)
    stats = guessing.stats()
    assert 0 < stats["right"] < stats["guessed"]
    assert stats["preemptions"] > 0 or "blocks" not in limits


@trees
@pytest.mark.parametrize("how", [DRAWN, REPEATED])
@pytest.mark.parametrize("limits", [{}, {"blocks": 9}])
def test_by_the_answers_own_noise_drawn_answers_are_so_too(model, near, tree, how, limits):
    requests = some_requests(how, count=6, tokens=30)
    guessing = engine(model, f"rsd:model={near},{tree},rule=noise", **limits)
    assert answers(guessing, requests) == answers(engine(model), requests)
    assert 0 < guessing.stats()["right"] < guessing.stats()["guessed"]


@trees
@pytest.mark.parametrize("limits", [{}, {"blocks": 12}, {"step_tokens": 40}])
def test_a_draft_that_is_the_model_is_never_wrong(model, same, tree, limits):
    """Its keys and values are where they should be, whatever was gathered, reused, shared, preempted or cut."""
    guessing = engine(model, f"rsd:model={same},{tree}", **limits)
    beginning = tuple(4 + i % 50 for i in range(37))
    requests = [Request(prompt=beginning + (i,), max_tokens=45, n=1 + i % 3) for i in range(4, 8)]
    made = [one for _ in range(2) for one in proposals(guessing, requests)]  # the second time from what the pool has
    stats = guessing.stats()
    assert stats["right"] == sum(map(depth, made)) > stats["answered"] / 3
    assert stats["preemptions"] > 0 or "blocks" not in limits
    assert stats["reused"] > 0


@pytest.mark.parametrize(("tree", "deep"), [("branches=2+2+2+2", 4), ("width=3,depth=6", 6), ("branches=1+1", 2)])
def test_a_perfect_draft_saves_the_steps_of_its_depth(model, same, tree, deep):
    guessing = engine(model, f"rsd:model={same},{tree}")
    answers(guessing, [Request(prompt=(5, 6, 7), max_tokens=1 + 20 * (deep + 1))])
    assert guessing.stats()["steps"] == 1 + 20


def test_a_tree_of_one_branch_is_a_chain(model, near):
    requests = some_requests(DRAWN)
    chain, tree = (
        engine(model, f"draft:model={near},tokens=4"),
        engine(model, f"rsd:model={near},branches=1+1+1+1,rule=noise"),
    )
    assert answers(chain, requests) == answers(tree, requests)
    counts = ("steps", "drafts", "guessed", "right")
    assert [chain.stats()[name] for name in counts] == [tree.stats()[name] for name in counts]


@trees
@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.8}], ids=["whole", "top_k", "top_p"])
def test_drawn_answers_have_the_models_distribution(tmp_path, tree, how):
    """Three tokens of a vocabulary of six: all 216 answers, each as often as the model has it."""
    said, stats, law = sample(tmp_path, tree, Sampling(temperature=1.3, **how), draws=1024)
    assert_law(said, law)
    assert stats["right"] > stats["drafts"] / 10


@pytest.mark.slow
@trees
def test_fifty_thousand_drawn_answers_have_the_models_distribution(tmp_path, tree):
    said, _, law = sample(tmp_path, tree, Sampling(temperature=1.0), draws=50_048, vocabulary=8)
    assert_law(said, law)


def sample(folder, tree, how, draws, vocabulary=6, length=3):
    """Answers after one prompt, what was guessed for them, and the probability of every answer."""
    model = large(vocab_size=vocabulary)
    small = draft(folder / "m", noise=0.4, vocab_size=vocabulary)
    guessing = engine(model, f"rsd:model={small},{tree}", batch=64, step_tokens=1024, blocks=512)
    prompt, told = (1, 2, 3), {}
    for number in range(draws // 128):
        request = Request(prompt=prompt, max_tokens=length, n=128, sampling=replace(how, seed=number))
        guessing.submit(request)
        for event in guessing.run():
            told.setdefault((number, event.index), []).extend(event.tokens)
    law = torch.zeros(*[vocabulary] * length)
    with torch.no_grad():
        for path in product(range(vocabulary), repeat=length - 1):
            logits_TV = model(torch.tensor([[*prompt, *path]]))[0].float()
            share_TV = torch.stack([probabilities(row_V, how).double() for row_V in logits_TV[len(prompt) - 1 :]])
            chances = [float(share_TV[i, token]) for i, token in enumerate(path)]
            law[path] = torch.tensor(chances).double().prod() * share_TV[-1]
    return list(told.values()), guessing.stats(), law


def assert_law(said, law):
    """Chi-square over the answers that are expected often enough; the others are one."""
    size = law.shape[0]
    number = [sum(token * size**place for place, token in enumerate(reversed(answer))) for answer in said]
    found, expected = torch.bincount(torch.tensor(number), minlength=law.numel()), law.flatten() * len(said)
    assert not bool(found[expected == 0].any())
    often = expected >= 5
    found, expected = (torch.cat([x[often].double(), x[~often].double().sum()[None]]) for x in (found, expected))
    chi2 = float(((found - expected).square() / expected.clamp(min=1e-9)).sum())
    freedom = len(expected) - 1
    assert freedom > 8 and chi2 < freedom + DEVIATIONS * (2 * freedom) ** 0.5


@pytest.mark.parametrize("children", [1, 2, 4, 6])
def test_rejection_recovers_the_models_law_from_any_other(children):
    """Drawn without replacement from a law of six of eight tokens, two of which the model never says."""
    q_V = torch.tensor([0.0, 0.3, 0.02, 0.18, 0.0, 0.1, 0.25, 0.15])
    law = Law(torch.tensor([6, 0, 1, 7, 3, 4]), torch.tensor([0.05, 0.3, 0.1, 0.25, 0.2, 0.1], dtype=torch.float64))
    draws, found = 4000, torch.zeros(8)
    for number in range(draws):
        order = (law.share_C.log() + gumbel(mix(1, number), law.token_C)).topk(children).indices
        chances = [uniform(mix(2, number, k)) for k in range(children)]
        token, rest_V = judge(q_V, law, law.token_C[order].tolist(), chances)
        found[draw(rest_V, mix(3, number)) if token is None else token] += 1
    assert not bool(found[q_V == 0].any())
    expected = q_V[q_V > 0] * draws
    chi2 = float(((found[q_V > 0] - expected).square() / expected).sum())
    freedom = len(expected) - 1
    assert chi2 < freedom + DEVIATIONS * (2 * freedom) ** 0.5


def test_one_child_is_judged_by_the_usual_rule():
    q_V = torch.tensor([0.5, 0.2, 0.3])
    law = Law(torch.tensor([0, 1, 2]), torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64))
    assert judge(q_V, law, [0], [0.999])[0] == 0
    assert judge(q_V, law, [1], [0.33])[0] == 1
    token, rest_V = judge(q_V, law, [1], [0.34])
    assert token is None
    torch.testing.assert_close(rest_V, torch.tensor([0.75, 0.0, 0.25], dtype=torch.float64))


def test_equal_laws_accept_the_first_child():
    law = Law(torch.tensor([2, 0, 1]), torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64))
    assert judge(torch.tensor([0.6, 0.3, 0.1]), law, [2, 1], [1 - 1e-12, 0.5])[0] == 2


def test_a_beams_noise_is_that_of_its_parents_best():
    noisy_C = torch.tensor([-1.0, 2.5, -40.0, 2.5 - 1e-9], dtype=torch.float64)
    found_C = conditioned(noisy_C, -0.7)
    by_definition_C = -((0.7 * torch.ones(1)).double().exp() - (-noisy_C.max()).exp() + (-noisy_C).exp()).log()
    torch.testing.assert_close(found_C, by_definition_C)
    assert float(found_C.max()) == -0.7 and found_C.argsort().tolist() == noisy_C.argsort().tolist()


def proposals(served, requests):
    """All drafts of a run."""
    made, propose = [], served.proposer.propose
    served.proposer.propose = lambda *what: made.append(propose(*what)) or made[-1]
    answers(served, requests)
    return [one for drafts in made for one in drafts if one]


@pytest.mark.parametrize("how", [GREEDY, DRAWN])
@pytest.mark.parametrize("tree", ["branches=3+2+1", "width=4,depth=3", "branches=4+4+4,tokens=30"])
def test_guesses_at_one_place_differ_and_the_tree_has_its_shape(model, near, how, tree):
    made = proposals(engine(model, f"rsd:model={near},{tree}", step_tokens=512), some_requests(how, count=4, tokens=20))
    sizes = RSD(model=near, **({"tokens": 30} if "30" in tree else {}), **shape(tree)).widths
    assert sizes == {"branches=3+2+1": [3, 6, 6], "width=4,depth=3": [4, 4, 4]}.get(tree, [4, 16, 10])
    for one in made:
        assert len(set(zip(one.parents, one.tokens, strict=True))) == len(one)
        assert all(parent < number for number, parent in enumerate(one.parents))
    assert max(map(len, made)) == sum(sizes)


def shape(tree):
    knobs = dict(knob.split("=") for knob in tree.split(","))
    if "branches" in knobs:
        return {"branches": tuple(map(int, knobs["branches"].split("+")))}
    return {name: int(value) for name, value in knobs.items()}


@pytest.mark.parametrize("rule", ["rejection", "noise"])
def test_of_as_many_guesses_a_tree_keeps_more_than_a_chain(model, tmp_path, rule):
    """Eight guesses, four levels of two or eight of one."""
    small, how = draft(tmp_path / "m", noise=0.2), Sampling(temperature=1.0, seed=3)
    requests = some_requests(how, count=8, tokens=30)

    def a_step(shape):
        served = engine(model, f"rsd:model={small},{shape},rule={rule}", step_tokens=512, batch=8, blocks=256)
        answers(served, requests)
        return served.stats()["answered"] / served.stats()["drafts"]

    chain = a_step("branches=1+1+1+1+1+1+1+1")
    assert a_step("width=2,depth=4") > chain and a_step("branches=2+1+1+1") > chain


def test_the_same_seed_gives_the_same_answers(model, near):
    first, second = (answers(engine(model, f"rsd:model={near}"), some_requests(DRAWN, count=4)) for _ in range(2))
    assert first == second


def test_random_requests_end_once_and_leave_nothing(tmp_path):
    decoding = f"rsd:model={draft(tmp_path / 'm')},width=2,depth=3"
    serve_at_random("priority", "fastswitch:size=1MiB", decoding, 40)


def test_answers_of_adapters_are_guessed_by_the_bare_draft(near, tmp_path):
    folder = write_adapter(tmp_path / "a", 8, 1, make_model=large)
    requests = [
        replace(request, adapter="a" * (i % 2)) for i, request in enumerate(some_requests(GREEDY, count=4, tokens=30))
    ]
    found = []
    for decoding in ("plain", f"rsd:model={near}"):
        served = engine(large(), decoding, blocks=24)
        served.register("a", folder)
        found.append(answers_beside_adapters(served, requests))
    assert found[0] == found[1]
    assert served.stats()["right"] > 0 and served.stats()["adapter_loads"] > 0


def answers_beside_adapters(served, requests):
    ids = [served.submit(request) for request in requests]
    events = served.run()
    served.check_integrity()
    return [[t for e in events if e.id == id for t in e.tokens] for id in ids]


class Even:
    """Says even tokens only."""

    def allowed(self):
        return list(range(4, 132, 2))

    def advance(self, token):
        assert token % 2 == 0


def test_a_constraint_goes_without_guesses_beside_answers_that_have_them(model, near):
    requests = [
        replace(r, constraint=Even if i % 2 else None) for i, r in enumerate(some_requests(GREEDY, count=4, tokens=30))
    ]
    guessing = engine(model, f"rsd:model={near}")
    assert answers(guessing, requests) == answers(engine(model), requests)
    assert guessing.stats()["right"] > 0


def test_logprobs_are_those_of_plain_decoding(model, near):
    found = []
    for decoding in ("plain", f"rsd:model={near}"):
        served = engine(model, decoding)
        served.submit(Request(prompt=(5, 6, 7), max_tokens=40, logprobs=2))
        found.append(torch.tensor([p.logprob for e in served.run() for p in e.logprobs]))
    assert len(found[0]) == 40
    assert (found[0] - found[1]).abs().max() <= TOLERANCE[torch.float32] * found[0].abs().max()


def test_logits_that_are_no_numbers_end_the_guessing_only(model, tmp_path):
    requests = some_requests(GREEDY, count=4)
    guessing = engine(model, f"rsd:model={draft(tmp_path / 'm', noise=float('nan'))}")
    assert answers(guessing, requests) == answers(engine(model), requests)
    assert guessing.stats()["guessed"] == 0


def test_no_guess_stands_beyond_the_end_of_the_answer(model, near):
    """Nor beyond the positions that the models know."""
    served = engine(model, f"rsd:model={near},width=5,depth=9", context=32, step_tokens=512)
    for one in proposals(served, [Request(prompt=(5,) * 20, max_tokens=12)]):
        assert depth(one) <= 10
    assert served.stats()["answered"] == 12


def depth(one: Draft):
    levels = []
    for parent in one.parents:
        levels.append(1 + (levels[parent] if parent >= 0 else 0))
    return max(levels)


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"width": 0}, "width=0 is outside"),
        ({"depth": 64}, "depth=64 is outside"),
        ({"branches": (2, 0)}, "every guess has 1 or more"),
        ({"rule": "luck"}, "no rule 'luck'; there is rejection, noise"),
        ({"tokens": 64}, "tokens=64 is outside"),
    ],
)
def test_what_cannot_be_is_refused(knobs, complaint):
    with pytest.raises(UserError, match=complaint):
        RSD(model="x", **knobs)
