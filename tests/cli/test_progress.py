"""A running job and its receipt, as a terminal and as a log show them."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from satchel.cli import progress, receipt
from satchel.cli.progress import PlainProgress, RichProgress
from satchel.core.units import parse_bytes

STEP = {"loss": 2.34567, "tokens_per_second": 1234.5, "memory_bytes": parse_bytes("600MiB")}


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=160)


def run(report, steps):
    report.limit_bytes = parse_bytes("900MiB")
    with report:
        report.begin(steps)
        report.step({"step": 0, "held_out_loss": 3.25})
        for step in range(1, steps + 1):
            report.step({"step": step, **STEP})
        report.note("checkpoint saved")
    return report.console.file.getvalue()


def test_a_log_has_rate_loss_and_memory_against_the_budget(screen):
    said = run(PlainProgress(screen, every_s=0.0), 3)
    assert "step 3/3  loss 2.346  1,234 tokens/s  600 MiB of 900 MiB" in said
    assert "step 0: held-out loss 3.250" in said and "checkpoint saved" in said
    assert said.splitlines()[2].endswith("left  600 MiB of 900 MiB".removeprefix("left")) and " left" in said


def test_a_log_of_many_steps_stays_short_and_has_the_last(screen):
    lines = [line for line in run(PlainProgress(screen, every_s=60.0), 500).splitlines() if line.startswith("step")]
    assert [line.split()[1].rstrip(":") for line in lines] == ["0", "1/500", "500/500"]


def test_a_terminal_shows_one_bar(screen):
    said = run(RichProgress(screen), 5)
    assert "5/5" in said and "loss 2.346" in said and "1,234 tokens/s" in said and "600 MiB of 900 MiB" in said


def test_while_a_plan_is_made_its_last_rung_is_shown(screen):
    shown = RichProgress(screen)
    shown.rung(SimpleNamespace(changes=(), peak_bytes=2**31))
    shown.rung(SimpleNamespace(changes=("activations=full", "micro_batch=1"), peak_bytes=2**30))
    assert shown.waiting.status.plain == "rehearsed 2: activations=full, micro_batch=1: 1.00 GiB"


def test_a_receipt_sets_prediction_beside_measurement(screen, monkeypatch):
    monkeypatch.setattr(receipt, "out", screen)
    lines = (
        SimpleNamespace(name="peak", unit="bytes", predicted=2**30, measured=2**30 * 0.8, error=0.25),
        SimpleNamespace(name="step", unit="seconds", predicted=1.5, measured=None, error=None),
    )
    receipt.print_receipt(
        SimpleNamespace(
            device="some CPU",
            budget_bytes=2**31,
            lines=lines,
            losses={"held_out_before": 3.0, "held_out_after": 2.5},
            tokens=12000,
            seconds=10.0,
            outputs={"adapter": "runs/tune/adapter"},
            notes=("smaller micro-batches after step 3",),
        )
    )
    said = screen.file.getvalue()
    assert "1.00 GiB" in said and "819 MiB" in said and "+25.0%" in said
    assert "12,000 in 10.0 s, 1,200 a second" in said and "runs/tune/adapter" in said
    assert "held out after" in said and "2.5000" in said and "smaller micro-batches" in said


def test_the_plan_is_shown_before_and_the_receipt_after(screen, monkeypatch):
    seen = []
    monkeypatch.setattr(progress, "print_plan", lambda plan: seen.append(plan))
    monkeypatch.setattr(progress, "print_receipt", lambda receipt: seen.append(receipt))
    plan = SimpleNamespace(budget_bytes=parse_bytes("900MiB"))
    with PlainProgress(screen) as report:
        report.plan(plan)
        report.end("the receipt")
    assert seen == [plan, "the receipt"] and report.limit_bytes == parse_bytes("900MiB")
