"""The bench's two sides do the same work: same tokens, same loss, and every method of the book has its row."""

import json

import pytest

from bench import _tune_peer, _tune_satchel, tune
from bench._toy import toy
from bench._tune_loop import Tokens


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    toy(folder / "random", width=192, layers=1)
    tune.prepare(folder, steps=2, model=str(folder / "random"))
    return folder


def test_every_method_of_the_book_is_measured():
    assert tune.unmeasured(tune.MAIN + tune.SLOTS) == []


def test_both_sides_see_the_same_blocks_in_the_same_order(work):
    tokens = Tokens.read(work / "tokens.npz")
    batch = _tune_satchel.rows(tokens.train_MC).batch(tokens.order_SB[1])
    blocks_BC = tokens.train_MC[tokens.order_SB[1]]
    assert (batch.tokens_1N[0].numpy() == blocks_BC[:, :-1].ravel()).all()
    assert (batch.targets_1N[0].numpy() == blocks_BC[:, 1:].ravel()).all()
    assert not {block.tobytes() for block in tokens.held_out_MC} & {block.tobytes() for block in tokens.train_MC}


def test_both_sides_start_from_the_same_loss_and_take_the_same_step(work):
    settings = {"work": str(work), "steps": 2, "dtype": "fp32", "lr": 1e-3, "adapter": "none"}
    ours = _tune_satchel.main(**settings, optimizer="adamw")
    theirs = _tune_peer.main(**settings)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=1e-4)
    assert ours["state_bytes"] == pytest.approx(theirs["state_bytes"], rel=1e-3)
    assert ours["above_model_bytes"] > 0


def test_a_side_that_failed_leaves_a_dash_and_its_reason():
    pair = tune.SLOTS[0]
    line = tune.row(pair, {"held_out": 2.0, "cpu_s": 1.0}, {"error": "no such library"}, steps=2)
    assert line["loss ratio"] == "-"
    assert line["held-out loss"] == "2.0000 / -"
    assert line["peer"].endswith("it failed: no such library")
    json.dumps(line)
