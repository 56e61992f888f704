import pytest
import torch

from satchel.core.errors import UserError
from satchel.core.seams import Domain
from satchel.train.replay import Replay
from tests.tolerances import TOLERANCE

DOMAINS = (Domain("new", 0.1, 10.0), Domain("newer", 0.3, 30.0), Domain("old", 0.4, 40.0), Domain("older", 0.2, 20.0))


def test_every_step_has_its_share_of_old_data_and_the_sources_keep_their_proportions():
    replay = Replay(share=0.25, old=2)
    assert {replay.at(step, 99, DOMAINS) for step in range(99)} == {replay.at(0, 99, DOMAINS)}
    expected = (0.75 / 4, 0.75 * 3 / 4, 0.25 * 2 / 3, 0.25 / 3)
    assert replay.at(0, 99, DOMAINS) == pytest.approx(expected, rel=TOLERANCE[torch.float64])


def test_a_run_is_as_long_as_the_new_data_make_it_whatever_the_share():
    assert {Replay(share=share, old=2).epoch_steps(DOMAINS) for share in (0.0, 0.05, 0.5)} == {40.0}


def test_old_sources_of_weight_0_are_drawn_equally():
    domains = (Domain("new", 1.0, 10.0), Domain("old", 0.0, 40.0), Domain("older", 0.0, 20.0))
    assert Replay(share=0.5, old=2).at(0, 9, domains) == (0.5, 0.25, 0.25)


def test_without_a_new_source_it_says_so():
    with pytest.raises(UserError, match="leaves no new source among 2; name new sources first"):
        Replay(old=2).at(0, 9, DOMAINS[:2])
