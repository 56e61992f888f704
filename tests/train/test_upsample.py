import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from satchel.core.errors import UserError
from satchel.core.seams import Domain
from satchel.train.upsample import Upsample, capped
from tests.tolerances import TOLERANCE

EXACT = TOLERANCE[torch.float64]
DOMAINS = (Domain("crawl", 0.9, 900.0), Domain("code", 0.06, 60.0), Domain("maths", 0.04, 4.0))


def test_the_mix_changes_at_the_last_share_of_the_steps_and_not_before():
    mixture, base = Upsample(last=0.2, to=(1, 2, 1), cap=100), tuple(d.share for d in DOMAINS)
    mixes = [mixture.at(step, 1000, DOMAINS) for step in range(1000)]
    assert set(mixes[:800]) == {base} and set(mixes[800:]) == {(0.25, 0.5, 0.25)}


def test_a_small_source_is_not_seen_more_often_than_the_cap_and_the_rest_goes_to_the_others():
    shares = Upsample(last=0.1, to=(1, 1, 2), cap=5).at(950, 1000, DOMAINS)
    assert shares == pytest.approx((0.4, 0.4, 0.2), rel=EXACT)  # 5 passes of 4 steps in the last 100


def test_a_source_can_be_left_out_of_the_end_and_before_it_nothing_changes():
    every, without = Upsample(cap=100), Upsample(cap=100, without=2)
    assert every.at(0, 100, DOMAINS) == without.at(0, 100, DOMAINS)
    assert without.at(99, 100, DOMAINS) == pytest.approx((0.5, 0.0, 0.5), rel=EXACT)


@given(st.lists(st.tuples(st.just(0.0) | st.floats(0.01, 9), st.floats(0.01, 2)), min_size=1, max_size=6))
def test_capped_shares_are_shares_below_their_limits_in_proportion_where_they_are_free(pairs):
    weights, limits = zip(*pairs, strict=True)
    if not sum(weights):
        return
    shares = capped(weights, limits)
    assert sum(shares) == pytest.approx(1, rel=EXACT) and min(shares) >= 0
    if sum(limit for weight, limit in pairs if weight) < 1:
        return  # all reach their limits: then all pass them by one factor
    assert all(share <= limit * (1 + EXACT) for share, limit in zip(shares, limits, strict=True))
    rates = [s / w for s, w, lim in zip(shares, weights, limits, strict=True) if w and s < lim * (1 - EXACT)]
    assert rates == pytest.approx([max(rates)] * len(rates), rel=TOLERANCE[torch.float32]) if rates else True


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"to": (1.0, 2.0)}, "2 weights for 3 sources"),
        ({"without": 4}, "there are 3 sources"),
        ({"to": (0.0, 1.0, 0.0), "without": 2}, "no source is left"),
    ],
)
def test_weights_that_do_not_match_the_sources_are_refused(knobs, complaint):
    with pytest.raises(UserError, match=complaint):
        Upsample(**knobs).at(99, 100, DOMAINS)
