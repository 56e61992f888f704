"""The ladder as a terminal shows it."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from satchel.cli import plan as module
from satchel.core.units import parse_bytes
from satchel.run.planner import Plan


def rung(changes, peak, **facts):
    accounts = {"weights": parse_bytes("257MiB"), "process": parse_bytes("300MiB"), "kv": 0}
    phases = (
        SimpleNamespace(name="load", peak_bytes=2**20, accounts={"weights": 2**20}),
        SimpleNamespace(name="train", peak_bytes=2**22, accounts={"weights": 2**20, "activations": 3 * 2**20}),
    )
    defaults = {
        "fits": False,
        "advice": False,
        "costs": "",
        "seconds_per_step": 2.8,
        "accounts": accounts,
        "seconds": {},
    }
    rehearsal = SimpleNamespace(phases=phases, second_tier_bytes=3 << 30, step=())
    sizes = {"peak_bytes": parse_bytes(peak)}
    return SimpleNamespace(changes=changes, rehearsal=rehearsal, **sizes, **(defaults | facts))


def shown(monkeypatch, rungs, chosen=None, width=100, explain=False):
    screen = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(module, "out", screen)
    job = SimpleNamespace(model="demo")
    own = [rung for rung in rungs if not rung.advice]
    smallest = min(own, key=lambda rung: rung.peak_bytes)
    plan = Plan(job, "900 MiB", parse_bytes("900MiB"), "a CPU", tuple(rungs), chosen, smallest)
    module.print_plan(plan, explain)
    return screen.file.getvalue()


def test_each_rung_has_its_accounts_its_time_and_what_it_costs(monkeypatch):
    rungs = [rung((), "1.5GiB"), rung(("activations=full",), "800MiB", fits=True, costs="full: compute")]
    said = shown(monkeypatch, rungs, chosen=rungs[1])
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    assert lines["weights"] == ["257", "MiB", "257", "MiB"] and lines["process"] == ["300", "MiB", "300", "MiB"]
    assert lines["peak"] == ["1.50", "GiB", "800", "MiB"] and lines["step"] == ["2.8", "s", "2.8", "s"]
    assert "too big" in said and "chosen" in said and "kv" not in lines
    assert lines["1"] == ["nothing:", "the", "job", "as", "given", "-"]
    assert lines["2"] == ["activations=full", "full:", "compute"]
    assert "Fits 900 MiB with activations=full." in said and "run" not in lines
    assert "The smallest budget that would do is 844 MiB, with activations=full." in said  # another process may differ


def test_a_run_of_known_length_has_its_time_and_what_takes_it(monkeypatch):
    seconds = {"load": 0.01, "evaluate": 40.0, "train": 56.0}
    fitting = rung((), "800MiB", fits=True, seconds=seconds)
    said = shown(monkeypatch, [fitting], chosen=fitting)
    assert "1 min 36 s" in said and "Time: 56.0 s train, 40.0 s evaluate." in said


def test_advice_is_another_kind_of_job_beside_the_smallest_budget_of_this_kind(monkeypatch):
    rungs = [rung((), "1.5GiB"), rung(("adapter=lora",), "700MiB", fits=True, advice=True)]
    said = shown(monkeypatch, rungs)
    assert "would fit" in said and "Another kind of job would fit: adapter=lora." in said
    assert "The smallest budget that would do for it is 1.55 GiB." in said


def test_advice_that_does_not_fit_names_its_own_budget(monkeypatch):
    rungs = [rung((), "1.5GiB"), rung(("adapter=lora",), "1GiB", advice=True)]
    assert "Another kind of job would need 1.04 GiB: adapter=lora." in shown(monkeypatch, rungs)


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_ladder_is_cut_to_the_width_of_the_terminal(monkeypatch, width):
    said = shown(monkeypatch, [rung((f"micro_batch={n}",), "1GiB") for n in range(9)], width=width)
    assert sum(line.startswith("peak") for line in said.splitlines()) == -(-9 // ((width - 14) // 12))
    assert max(map(len, said.splitlines())) <= width


def test_explaining_shows_the_peak_of_each_phase_and_why(monkeypatch):
    said = shown(monkeypatch, [rung((), "800MiB", fits=True)], explain=True)
    assert "The phases of rung 1" in said and "75% activations" in said and "100% weights" in said
    assert "In the second tier: 3.00 GiB of activations." in said
