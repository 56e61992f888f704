import pytest
import torch
import transformers

from satchel.train.linear import Linear
from tests.tolerances import TOLERANCE
from tests.train.common import check_equals_transformers, factors


def test_equals_transformers():
    check_equals_transformers(Linear(warmup=0), transformers.get_linear_schedule_with_warmup)


def test_every_step_falls_as_far_and_the_next_would_be_at_its_final_share():
    values = [*factors(Linear(warmup=0, final=0.25)), 0.25]
    falls = [earlier - later for earlier, later in zip(values, values[1:], strict=False)]
    assert falls == pytest.approx([0.75 / 200] * 200, rel=TOLERANCE[torch.float64])
