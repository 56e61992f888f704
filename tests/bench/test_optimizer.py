"""The optimizers' bench runs all of them on the same rows, and says how sure it is."""

import json

import numpy as np
import pytest

from bench import optimizer
from bench._tune_loop import Tokens
from satchel.core import book


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = optimizer.Bench(tmp_path_factory.mktemp("optimizer"), steps=2)
    for job in optimizer.JOBS:
        optimizer.prepare(made.folder(job), job, 2, [0, 1], quick=True)
    return made


def test_every_optimizer_of_the_book_is_measured_and_spelled_as_it_may_be():
    names = optimizer.measured()
    assert optimizer.BASE in names
    for job in optimizer.JOBS:
        assert set(job.settings) <= set(names)
        assert all(book.make("optimizer", job.spelled(name)).name == name for name in names)
        assert job.rate("adamw") == job.base and job.rate("galore") == pytest.approx(4 * job.base)


def test_seeds_see_the_same_rows_in_another_order_and_nothing_that_is_held_out(bench):
    first, second = (Tokens.read(bench.folder(optimizer.JOBS[1]) / str(seed) / "tokens.npz") for seed in (0, 1))
    assert (first.train_MC == second.train_MC).all() and (first.order_SB != second.order_SB).any()
    assert not {row.tobytes() for row in first.held_out_MC} & {row.tobytes() for row in first.train_MC}


def test_fewer_tokens_keep_the_frequent_ones_apart():
    tokens = Tokens(np.array([[7, 7, 7, 9, 9, 5]]), np.array([[9, 7, 8]]), np.zeros((1, 1)))
    found = optimizer.fewer(tokens, 3)
    assert found.train_MC.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert found.held_out_MC.tolist() == [[1, 0, 2]]


def test_a_run_fills_its_row_beside_adamw(bench, monkeypatch):
    monkeypatch.setattr(optimizer, "measure", in_process)
    job = optimizer.JOBS[1]
    for name in (optimizer.BASE, "adamw8bit"):
        bench.run(job, name, 1e-3, seed=0)
    base, ours = (bench.of(job, name, [0]) for name in (optimizer.BASE, "adamw8bit"))
    line = optimizer.row(job, "adamw8bit", ours, base, optimizer.accounts(bench, job, "adamw8bit"))
    assert float(line["loss ratio"].split()[0]) == pytest.approx(1, abs=0.02)
    assert line["state, MiB"] < 0.6 * optimizer.median(run["state_bytes"] for run in base) / optimizer.MIB
    assert "optimizer" in line["rehearsed peak by account, MiB"]
    json.dumps(line)


def in_process(module, argument, patience_s):
    from bench import _tune_satchel

    return _tune_satchel.main(**argument)


def test_a_failure_is_a_row_too():
    line = optimizer.row(optimizer.JOBS[0], "galore", [{"error": "no memory"}], [], {})
    assert line["peak"] == "failed: no memory"


def test_the_interval_holds_the_mean_of_few_runs_19_times_in_20():
    rng = np.random.default_rng(0)
    intervals = [optimizer.interval(list(rng.normal(5, 2, 3))) for _ in range(4000)]
    assert np.mean([abs(middle - 5) <= width for middle, width in intervals]) == pytest.approx(0.95, abs=0.02)
