"""The bench's two sides do the same work: same tokens, same loss, and every method of the book has its row."""

import json
from types import SimpleNamespace

import pytest

from bench import _harness, _tune_peer, _tune_satchel, tune
from bench._toy import toy
from bench._tune_loop import Tokens
from satchel.run.rung import SLOTS


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    toy(folder / "random", width=192, layers=1)
    tune.prepare(folder, steps=2, model=str(folder / "random"))
    return folder


def test_every_method_of_the_book_is_measured():
    assert tune.unmeasured(tune.MAIN + tune.SLOTS) == []


def test_an_interrupted_bench_keeps_what_it_has(tmp_path, monkeypatch):
    numbers = iter([1.0, 2.0, 4.0])

    def measured(module, argument, patience_s):
        number = next(numbers, None)
        if number is None:
            raise KeyboardInterrupt
        return {name: number for name, _, _ in tune.CELLS.values()}

    monkeypatch.setattr(tune, "measure", measured)
    monkeypatch.setattr(tune, "prepare", lambda *_: None)
    monkeypatch.setattr(tune, "interleave", lambda keys, times: list(keys))
    monkeypatch.setattr(_harness, "RESULTS", tmp_path)
    monkeypatch.setattr(_harness, "device", lambda kind: SimpleNamespace(name="a CPU", cores=2, torch="2"))
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--quick"])
    kept = json.loads((tmp_path / "tune.json").read_text())
    assert sum(map(len, kept["runs"].values())) == 3
    assert [line["loss ratio"] for line in kept["table"]] == [0.5]  # of the second row only our side is there


def test_a_resumed_bench_measures_what_is_missing_and_what_failed(tmp_path, monkeypatch):
    calls = []

    def measured(module, argument, patience_s):
        calls.append(argument)
        return {"error": "killed"} if len(calls) == 2 else {name: 1.0 for name, _, _ in tune.CELLS.values()}

    monkeypatch.setattr(tune, "measure", measured)
    monkeypatch.setattr(tune, "prepare", lambda *_: None)
    monkeypatch.setattr(_harness, "ROOT", tmp_path)
    for module in (tune, _harness):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(_harness, "device", lambda kind: SimpleNamespace(name="a CPU", cores=2, torch="2"))
    asked = ["--only", "LoRA r=8, bf16", "--steps", "3", "--slot-steps", "0"]
    tune.main([*asked, "--repetitions", "1"])
    assert len(calls) == 2  # ours and the peer's, which failed
    tune.main([*asked, "--repetitions", "2", "--resume"])
    assert len(calls) == 2 + 1 + 2
    kept = json.loads((tmp_path / "tune.json").read_text())
    assert sorted(map(len, kept["runs"].values())) == [2, 2]
    assert [line["loss ratio"] for line in kept["table"]] == [1.0]


def test_a_choice_of_the_planner_is_compared_with_the_plain_job_of_its_slot(tmp_path):
    bench = tune.Bench(tmp_path)
    ours = {("activations", "lemo"): 3.0, ("activations", "memo"): 2.0}
    for key, loss in ours.items():
        bench.found[bench.key(tune.choices()[key], 6)] = [{"held_out": loss, "cpu_s": 2.0, "above_model_bytes": 1.0}]
    plain = {"held_out": 2.0, "cpu_s": 4.0, "above_model_bytes": 1.0}
    assert tune.quality(bench, 6) == []  # the plain job, a LoRA, was not measured
    bench.found[bench.key(tune.ours(tune.LORA), 6)] = [plain]
    same = {"slot": "activations", "steps": 6, "memory": 1.0, "CPU": 0.5}
    assert tune.quality(bench, 6) == [
        same | {"method": name, "loss": loss} for name, loss in (("lemo", 1.5), ("memo", 1.0))
    ]


def test_whatever_the_planner_may_choose_has_a_plain_job_beside_it():
    assert {*tune.PLAIN, "optimizer"} == set(SLOTS)
    asked = tune.arguments(["--quick"])
    keys = {tune.Bench.key(side, 2) for each in tune.rounds(asked) for side in each.alone}
    assert {tune.Bench.key(side, 2) for side in tune.choices().values()} < keys


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
