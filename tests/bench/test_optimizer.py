"""The optimizers' bench runs all of them on the same rows, and says how sure it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import _harness, optimizer
from bench._tune_loop import Tokens
from docs.headlines import headline
from satchel.core import book

SMALL = optimizer.JOBS[1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = optimizer.Bench(tmp_path_factory.mktemp("optimizer"), steps=2)
    optimizer.prepare(made.folder(SMALL), SMALL, made.length(SMALL), [0, 1, optimizer.SWEEP_SEED], quick=True)
    return made


def test_every_optimizer_of_the_book_is_measured_and_spelled_as_it_may_be():
    for job in optimizer.JOBS:
        names = {book.make("optimizer", spelling).name for spelling in job.optimizers()}
        assert names == {entry.name for entry in book.entries() if entry.slot == "optimizer"}
        assert {optimizer.BASE, optimizer.LISA, optimizer.WIDER_LISA} <= set(job.optimizers())
        assert len(set(job.optimizers())) == len(job.optimizers())
        assert job.rate("adamw") == job.base and job.rate("galore") == pytest.approx(4 * job.base)


def test_seeds_see_the_same_rows_in_another_order_and_nothing_that_is_held_out(bench):
    homes = (bench.folder(SMALL) / optimizer.order(bench.length(SMALL), seed) for seed in (0, 1))
    first, second = (Tokens.read(home / "tokens.npz") for home in homes)
    assert (first.train_MC == second.train_MC).all() and (first.order_SB != second.order_SB).any()
    assert not {row.tobytes() for row in first.held_out_MC} & {row.tobytes() for row in first.train_MC}


def test_fewer_tokens_keep_the_frequent_ones_apart():
    tokens = Tokens(np.array([[7, 7, 7, 9, 9, 5]]), np.array([[9, 7, 8]]), np.zeros((1, 1)))
    found = optimizer.fewer(tokens, 3)
    assert found.train_MC.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert found.held_out_MC.tolist() == [[1, 0, 2]]


def test_a_run_fills_its_row_beside_adamw(bench, monkeypatch):
    monkeypatch.setattr(_harness, "measure", in_process)
    for name in (optimizer.BASE, "adamw8bit"):
        bench.run(SMALL, name, 1e-3, seed=0)
        bench.time(SMALL, name, 1e-3, 0)
    rehearsed = optimizer.rehearsal(bench, SMALL, "adamw8bit")
    ours = optimizer.row(SMALL, "adamw8bit", bench, [0], rehearsed)
    base = optimizer.row(SMALL, optimizer.BASE, bench, [0], optimizer.rehearsal(bench, SMALL, optimizer.BASE))
    assert float(ours["loss ratio"].split()[0]) == pytest.approx(1, abs=0.02)
    assert ours["state, MiB"] < 0.6 * base["state, MiB"] and ours["peak ratio"] < base["peak ratio"] == 1
    assert min(base["CPU s/step"], ours["CPU s/step"]) > 0
    (run,) = bench.of(SMALL, "adamw8bit", [0])
    train = next(phase for phase in rehearsed.phases if phase.name == "train")
    assert ours["rehearsed"] == f"{train.peak_bytes / run['tensor_bytes'] - 1:+.1%}"
    assert "optimizer" in ours["by account, MiB"] and ours.keys() == base.keys()
    json.dumps([ours, base])


def test_a_bench_goes_on_from_the_runs_of_earlier_results(tmp_path, monkeypatch):
    for module in (optimizer, _harness):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(_harness, "ROOT", tmp_path)
    assert optimizer.Earlier.read() == optimizer.Earlier()
    run = {"job": SMALL.name, "optimizer": "lion", "lr": 1e-3, "seed": 0, "steps": 180, "held_out": 3.5}
    timed, failed = {"job": SMALL.name, "optimizer": "lion", "lr": 1e-3, "timing": 0}, run | {"seed": 1, "error": "no"}
    other = {"job": optimizer.JOBS[0].name, "optimizer": "lion"}
    found = {"table": [other, {"job": SMALL.name}], "runs": [run, timed, failed, run | other]}
    (tmp_path / "optimizer.json").write_text(json.dumps(found))
    bench, longer = (optimizer.Bench(tmp_path, steps, optimizer.Earlier.read()) for steps in (60, 61))
    monkeypatch.setattr(optimizer, "once", lambda *_, **__: {"held_out": 9.0, "tensor_bytes": 0, "cpu_s": 0})
    assert bench.run(SMALL, "lion", 1e-3, 0) == run and longer.run(SMALL, "lion", 1e-3, 0)["held_out"] == 9
    assert [bench.run(SMALL, *other)["held_out"] for other in (("lion", 1e-3, 1), ("lion", 2e-3, 0))] == [9, 9]
    assert [line["held_out"] for line in bench.runs] == [3.5, 9, 9]
    monkeypatch.setattr(optimizer, "row", lambda job, name, *_: {"job": job.name, "optimizer": name})
    monkeypatch.setattr(optimizer, "rehearsal", lambda *_: None)
    optimizer.report(bench, [SMALL], [0], optimizer.arguments(["--only", "lion"]))
    written = json.loads((tmp_path / "optimizer.json").read_text())
    assert [line["job"] for line in written["table"]] == [other["job"], SMALL.name, SMALL.name]
    assert [line["held_out"] for line in written["runs"]] == [3.5, 9, 9, 3.5] and written["runs"][3] == run | other


def test_a_report_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_harness, "measure", lambda *_, **__: {"held_out": 9.0, "tensor_bytes": 0, "cpu_s": 0})
    first, second = optimizer.Bench(tmp_path, 60), optimizer.Bench(tmp_path, 60, fresh=False)
    first.run(SMALL, "lion", 1e-3, 0)
    found = [second.run(SMALL, "lion", 1e-3, seed).get("held_out") for seed in (0, 1)]
    assert found == [9, None] and len(second.runs) == 1
    monkeypatch.setattr(optimizer, "prepare", lambda *_: None)
    monkeypatch.setattr(optimizer, "train", lambda bench, *_: asked.append(bench.fresh))
    monkeypatch.setattr(optimizer, "report", lambda *_: tmp_path)
    asked: list[bool] = []
    for options in ((), ("--report",)):
        optimizer.main(["--work", str(tmp_path), *options])
    assert asked == [True, False]


def test_a_learning_rate_is_doubled_and_halved_for_as_long_as_that_helps(bench, monkeypatch):
    usual, tried = SMALL.rate("lion"), []

    def run(bench, job, optimizer, lr, seed):
        tried.append(lr / usual)
        return {"held_out": losses.get(lr / usual, abs(lr / usual - 0.3))}

    losses: dict[float, float] = {}
    monkeypatch.setattr(optimizer.Bench, "run", run)
    assert bench.best_rate(SMALL, "lion", 4) == usual / 4 and sorted(tried) == [0.125, 0.25, 0.5, 1, 2]
    assert bench.best_rate(SMALL, "lion", 1) == usual / 2
    assert bench.best_rate(SMALL, "lion", 0) == usual
    losses |= {1: 1.0, 2: 0.9, 0.5: 0.8}  # falls on both sides, further on one
    assert bench.best_rate(SMALL, "lion", 4) == usual / 4
    losses |= {2: 0.7, 4: 0.6, 8: 0.6}
    assert bench.best_rate(SMALL, "lion", 4) == usual * 4


def test_a_tuned_model_looks_for_its_rate_in_short_runs_and_one_from_scratch_in_whole_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "once", lambda *_, **__: {"held_out": 9.0, "tensor_bytes": 0, "cpu_s": 0})
    bench, (tuned, scratch) = optimizer.Bench(tmp_path, 60), optimizer.JOBS
    for job, seed in ((tuned, 100), (tuned, 0), (scratch, 100), (scratch, 0)):
        bench.run(job, "lion", 1e-3, seed)
    assert optimizer.SWEEP_SEED == 100 and [run["steps"] for run in bench.runs] == [15, 60, 180, 180]


def test_the_planner_learns_of_each_form_as_it_spells_it():
    job = optimizer.JOBS[0]
    line = {"job": job.name, "by account, MiB": "weights 200, optimizer 1", "steps": 60, "seeds": 3}
    sizes = {"adamw": 1000, "apollo:rank=144,gap=40,moments=8bit,layerwise=true": 400, "lomo:form=ada": 300}
    sizes |= {"apollo:rank=72,gap=40": 500, "lisa:gamma=4,period=5": 600, "mezo": 280, "badam:period=2": 290}
    table = [line | {"optimizer": name, "peak, MiB": size} for name, size in sizes.items()]
    for number, each in enumerate(table):
        each["loss ratio"] = f"1.0{number} ± 0.1"
    found = optimizer.quality([*table, table[0] | {"job": SMALL.name, "peak, MiB": 9}, line | {"optimizer": "lion"}])
    names = [line["method"] for line in found]
    assert names == ["apollo:layerwise=true,moments=8bit", "lomo:form=ada", "lisa:gamma=4", "mezo", "badam"]
    assert found[0] == {"slot": "optimizer", "method": names[0], "steps": 60, "memory": 0.25, "loss": 1.01}
    assert optimizer.quality(table[1:]) == []


def test_what_is_lean_and_good_is_found():
    line = {"job": SMALL.name, "loss ratio": "1.0100 ± 0.1", "peak ratio": 0.4, "rehearsed": "-1.5%", "seeds": 3}
    fat, bad = line | {"peak ratio": 0.5}, line | {"loss ratio": "1.0300 ± 0.1"}
    names = ("galore", optimizer.LISA, optimizer.WIDER_LISA)
    table = [each | {"optimizer": name} for each, name in zip((line, fat, bad), names, strict=True)]
    for each, state in zip(table, (1, 10, 14), strict=True):
        each["by account, MiB"] = f"weights 30, optimizer {state}"
    found = optimizer.findings(table)
    assert found[f"{SMALL.name}: loss <= 1.02 at peak <= 0.45"] == ["galore"]
    assert found["rehearsed peaks off by, median and worst, %"] == [1.5, 1.5]
    assert (
        headline("optimizer", table)
        == f"peak at most 0.45x AdamW's and loss at most 1.02x: {SMALL.name}: galore (seeds: 3)"
    )
    assert found[f"{SMALL.name}: share of LISA's state that lies outside of the layers"] == 0.6


def in_process(module, argument, patience_s):
    from bench import _tune_satchel

    return _tune_satchel.main(**argument)


def test_a_failure_is_a_row_too():
    assert optimizer.row(SMALL, "galore", optimizer.Bench(Path("nowhere"), 2), [0], None)["lr"] == "not measured"


def test_the_interval_holds_the_mean_of_few_runs_19_times_in_20():
    rng = np.random.default_rng(0)
    said = [optimizer.interval(list(rng.normal(5, 2, 3))) for _ in range(4000)]
    intervals = [map(float, each.split(" ± ")) for each in said]
    assert np.mean([abs(middle - 5) <= width for middle, width in intervals]) == pytest.approx(0.95, abs=0.02)
    assert optimizer.interval([2.5]) == "2.5000"
