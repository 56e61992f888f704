"""A head that knows which guesses fail stops the drafting there, and changes no answer."""

import pytest
import torch

from satchel.core.errors import ModelError, UserError
from satchel.decode import Acceptance, train_acceptance
from satchel.decode._drafter import Line
from satchel.decode.specdecpp import SpecDecPP, _Judged
from satchel.model.load import load
from tests.decode.common import DRAWN, GREEDY, answers, engine, some_requests
from tests.decode.drafts import draft, large


@pytest.fixture(scope="module")
def model():
    return large()


@pytest.fixture(scope="module")
def near(tmp_path_factory, model):
    """A small model that is often right, and its head."""
    folder = draft(tmp_path_factory.mktemp("near") / "model", noise=0.01, odd=0.2)
    small = load(folder, torch.float32)
    learnt = train_acceptance(model, small, texts(), temperature=0.0, lr=1e-2)
    learnt.head.save(f"{folder}/acceptance.safetensors")
    return folder, learnt, small


def texts(count=100, length=100):
    rng = torch.Generator().manual_seed(3)
    return torch.randint(4, 132, (count, length), generator=rng).tolist()


def test_the_head_knows_more_than_how_often_guesses_are_right(near):
    _, learnt, _ = near
    assert 0.1 < learnt.kept < 0.95
    assert learnt.loss < learnt.constant


def test_training_is_a_function_of_its_seed_and_leaves_both_models_alone(model, near):
    _, learnt, small = near
    before = [p.clone() for each in (model, small) for p in each.parameters()]
    again = train_acceptance(model, small, texts(), temperature=0.0, lr=1e-2)
    assert again.loss == learnt.loss
    after = [p for each in (model, small) for p in each.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("how", [GREEDY, DRAWN])
@pytest.mark.parametrize("limits", [{}, {"blocks": 10}])
def test_guessing_changes_no_answer(model, near, how, limits):
    requests = some_requests(how)
    guessing = engine(model, f"specdecpp:model={near[0]},threshold=0.5", **limits)
    assert answers(guessing, requests) == answers(engine(model), requests)
    assert guessing.stats()["right"] > 0


def test_the_threshold_leads_from_the_shortest_guesses_to_the_longest(model, near):
    def lengths(decoding):
        served = engine(model, decoding, batch=1)
        answers(served, some_requests(GREEDY, count=2))
        return served.stats()["guessed"] / served.stats()["drafts"]

    found = [lengths(f"specdecpp:model={near[0]},tokens=12,threshold={t}") for t in (0.0, 0.3, 1.0)]
    assert found == sorted(found) and found[0] < 2.01 and found[1] < found[2]
    assert found[2] == lengths(f"draft:model={near[0]},tokens=12")


def test_of_guesses_more_are_right_than_with_a_fixed_length(model, near):
    def share(decoding):
        served = engine(model, decoding)
        answers(served, some_requests(GREEDY))
        return served.stats()["right"] / served.stats()["guessed"]

    assert share(f"specdecpp:model={near[0]},tokens=12,least=1") > share(f"draft:model={near[0]},tokens=12")


def test_a_line_ends_when_some_guess_before_the_newest_is_likely_wrong(near):
    method = SpecDecPP(model="x", least=2, threshold=0.3)
    judge = _Judged(near[2], None, 132, method, near[1].head)
    assert [judge.enough(Line(None, 9, [5] * n, chance)) for n, chance in ((1, 0.1), (2, 0.71), (2, 0.69))] == [
        False,
        False,
        True,
    ]


def test_a_head_comes_back_from_its_file_and_another_models_is_refused(model, near, tmp_path):
    with pytest.raises(ModelError, match=r"no such file; make it with satchel.decode.train_acceptance"):
        engine(model, f"specdecpp:model={near[0]},head={tmp_path / 'none.safetensors'}")
    Acceptance(64).save(tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match="no head for a model of width 32"):
        engine(model, f"specdecpp:model={near[0]},head={tmp_path / 'wide.safetensors'}")


def test_too_few_texts_are_refused(model, near):
    with pytest.raises(UserError, match="3 are too few"):
        train_acceptance(model, near[2], texts(3))
