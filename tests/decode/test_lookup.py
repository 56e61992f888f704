import pytest

from satchel.core.request import Request
from satchel.decode.lookup import Lookup
from tests.decode.common import DRAWN, GREEDY, REPEATED, answers, engine, some_requests
from tests.run.toys import toy_decoder


@pytest.fixture(scope="module")
def model():
    return toy_decoder()


@pytest.mark.parametrize("how", [GREEDY, DRAWN, REPEATED])
@pytest.mark.parametrize("limits", [{}, {"blocks": 10}, {"step_tokens": 7}])
def test_guessing_changes_no_answer(model, how, limits):
    requests = some_requests(how)
    guessing = engine(model, "lookup:tokens=5", **limits)
    assert answers(guessing, requests) == answers(engine(model), requests)
    assert guessing.stats()["guessed"] > 0


def test_an_answer_that_repeats_itself_takes_fewer_steps(model):
    """A greedy toy ends in a circle."""
    request = Request(prompt=(5, 6, 7), max_tokens=200)
    plain, guessing = engine(model), engine(model, "lookup:tokens=16")
    assert answers(plain, [request]) == answers(guessing, [request])
    assert guessing.stats()["steps"] < plain.stats()["steps"] / 2
    assert guessing.stats()["right"] > guessing.stats()["guessed"] / 2


def test_a_guess_is_what_followed_the_longest_run_that_was_seen_before():
    class Speaker:
        id, index = 0, 0

    lookup = Lookup(tokens=4, ngram=3).start(None)
    speaker = Speaker()
    speaker.tokens = [1, 2, 3, 9, 8, 7, 2, 3, 4, 5, 6, 6, 1, 2, 3]
    assert list(lookup.propose([speaker], [10], [1])[0].tokens) == [9, 8, 7, 2]
    assert list(lookup.propose([speaker], [2], [1])[0].tokens) == [9, 8]
    speaker.tokens = [*speaker.tokens, 4]
    assert list(lookup.propose([speaker], [10], [1])[0].tokens) == [5, 6, 6, 1]
    speaker.tokens = [*speaker.tokens, 5, 6]
    assert list(lookup.propose([speaker], [10], [1])[0].tokens) == [6, 1, 2, 3]
    speaker.tokens = [*speaker.tokens, 77]
    assert list(lookup.propose([speaker], [10], [1])[0].tokens) == []
    lookup.forget(speaker)
    assert not lookup.memories


def test_guesses_get_shorter_as_they_fail_and_longer_as_they_hold():
    class Speaker:
        id, index, tokens = 0, 0, [1, 2] * 20 + [1]

    lookup = Lookup(tokens=8).start(None)
    sizes = []
    for right in (8, 0, 1, 2, 1):
        guess = lookup.propose([Speaker], [60], [1])[0]
        sizes.append(len(guess))
        lookup.learn(Speaker, guess, range(min(right, len(guess))))
    assert sizes == [8, 8, 1, 2, 4]
