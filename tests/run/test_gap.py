"""Depth, recovery and area of a gap, on curves where they can be read off."""

import pytest
import torch

from satchel.run.gap import Gap, gap, said
from tests.tolerances import TOLERANCE


def test_a_triangle_of_loss_has_its_height_its_foot_and_its_area():
    found = gap([(0, 2.0), (10, 3.0), (20, 2.5), (30, 2.0), (40, 1.5)])
    assert found == Gap(depth=1.0, peak_step=10, recovered_step=30, area=15.0, final=-0.5)
    assert said("old", found) == (
        "old: the held-out loss rose by 1.000 at step 10, back at step 30; area 15 nats x steps"
    )


def test_a_loss_that_only_falls_has_no_gap():
    assert gap([(0, 2.0), (5, 1.8), (9, 1.0)]) == Gap(0.0, 0, 0, 0.0, -1.0)


def test_a_loss_that_stays_above_is_not_recovered():
    found = gap([(0, 1.0), (4, 1.5), (8, 1.25)])
    assert found.recovered_step is None and "not back" in said("old", found)
    assert (found.area, found.final) == pytest.approx((2.5, 0.25), rel=TOLERANCE[torch.float64])
