"""What each source gives is exact, known beforehand, and a function of seed and step alone."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from satchel.core.seams import Domain, Mixture
from satchel.run.data import Corpus
from satchel.run.mixture import Mixed, allot
from satchel.run.packing import fill
from satchel.train.fixed import Fixed
from satchel.train.replay import Replay


@dataclass(frozen=True, kw_only=True)
class Sliding(Mixture):
    """From the first source to the last."""

    def at(self, step, steps, domains):
        late = step / max(steps - 1, 1)
        return (1 - late, *(0.0 for _ in domains[2:]), late)


def rows(tokens, context=4, first=0):
    numbers = np.arange(first, first + tokens + 1, dtype=np.int32)
    return fill(Corpus(numbers, np.ones(tokens + 1, bool), np.array([0, tokens + 1]), "text"), np.arange(1), context)


def mixed(weights=(), mixture=None):
    return Mixed({"a": rows(40), "b": rows(23, first=1000), "c": rows(8, first=2000)}, weights, mixture or Fixed())


def domains(shares):
    return tuple(Domain(str(k), share / sum(shares), 10.0) for k, share in enumerate(shares))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda s: sum(s) > 0.1),
    st.integers(1, 9),
    st.integers(1, 300),
)
def test_whole_rows_never_stray_from_the_shares_and_every_step_is_full(shares, batch, total):
    given_SK = allot(Fixed(), domains(shares), batch, total)
    due = np.minimum(np.arange(len(given_SK)) * batch, total)[:, None] * np.array([d.share for d in domains(shares)])
    assert (given_SK.sum(1) == due.sum(1).round()).all() and (np.diff(given_SK, axis=0) >= 0).all()
    assert np.abs(given_SK - due).max() <= max(len(shares) - 1, 1e-6)


def test_two_sources_stay_within_a_row_of_their_shares_while_these_move():
    given_SK = allot(Sliding(), domains((1, 1)), 7, 700)
    late = np.arange(100) / 99
    due = 7 * np.concatenate([[0], np.cumsum(late)])
    assert np.abs(given_SK[:, 1] - due).max() <= 1 and given_SK[1].tolist() == [7, 0]
    assert np.diff(given_SK, axis=0)[-1].tolist() == [0, 7]


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_by_size_an_epoch_is_one_pass_over_each_source_and_so_is_the_second(batch):
    stream = mixed()
    steps, total = stream.length(batch, 0, 2.0)
    seen = [row for step in range(steps) for row in stream.step_rows(step, batch, 3, total)]
    assert sorted(seen) == sorted(2 * list(range(len(stream))))
    assert stream.fed(batch, total, 3, steps) == {"a": 80, "b": 46, "c": 16}


def test_a_source_goes_through_its_first_epoch_before_the_second():
    stream = mixed((1.0, 1.0, 2.0))
    steps, total = stream.length(5, 30, 0)
    seen = np.concatenate([stream.step_rows(step, 5, 0, total) for step in range(steps)])
    small = [row for row in seen if row >= 16][: 2 * 2]
    assert sorted(small[:2]) == sorted(small[2:4]) == [16, 17]
    assert len([row for row in seen if row >= 16]) == 75


def test_what_was_fed_is_what_the_batches_hold():
    stream = mixed((0.2, 0.5, 0.3))
    steps, total = stream.length(3, 20, 0)
    tokens = {"a": 0, "b": 0, "c": 0}
    for step in range(steps):
        assert stream.fed(3, total, 9, step) == tokens
        for batch in stream.batches(stream.step_rows(step, 3, 9, total), 2):
            for name, low in (("a", 0), ("b", 1000), ("c", 2000)):
                tokens[name] += int(((batch.tokens_1N >= low) & (batch.tokens_1N < low + 1000)).sum())
    assert stream.fed(3, total, 9, steps) == tokens


def test_a_step_is_a_function_of_seed_and_step():
    late = [mixed((0.2, 0.5, 0.3), Sliding()).step_rows(13, 5, seed, 100).tolist() for seed in (0, 0, 1)]
    assert late[0] == late[1] != late[2]


def test_replay_does_not_lengthen_the_run():
    stream = mixed((), Replay(share=0.25, old=2))
    steps, total = stream.length(4, 0, 2.0)
    assert total == 2 * 10 and stream.given(4, total)[-1].tolist() == [15, 4, 1]


def test_a_mixture_of_one_source_is_that_source():
    part = rows(40)
    alone = Mixed({"a": part}, (), Fixed())
    for step in range(6):
        assert (alone.step_rows(step, 4, 2, 24) == part.step_rows(step, 4, 2, 24)).all()
    assert alone.fullest() == part.fullest() and alone.tokens == part.tokens


def test_a_stream_is_over_when_its_rows_are():
    assert len(mixed().step_rows(5, 8, 0, 33)) == 0 and len(mixed().step_rows(4, 8, 0, 33)) == 1


def test_the_digest_sees_sources_names_and_weights():
    digests = {mixed().digest(), mixed((1.0, 1.0, 1.0)).digest(), Mixed({"x": rows(40)}).digest()}
    assert len(digests | {Mixed({"a": rows(40)}).digest(), Mixed({"a": rows(40, first=1)}).digest()}) == 5


def test_rounding_does_not_pile_up_over_a_hundred_thousand_steps():
    given_SK = allot(Fixed(), domains((0.61803, 0.3, 0.08197)), 64, 6_400_000)
    assert given_SK[-1].sum() == 6_400_000 and abs(int(given_SK[-1][0]) - 6_400_000 * 0.61803) <= 2
