"""The loop: what it records, how it stops, what it refuses, and that shortage of memory changes no result."""

import errno
import itertools
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from satchel.core.errors import Diverged, JobError, NoDisk, UserError
from satchel.core.report import Report
from satchel.run import trainer
from satchel.run.assemble import assemble
from satchel.run.data import read_dataset
from satchel.run.governor import Governor
from satchel.run.metrics import read_metrics
from satchel.run.trainer import train
from tests.run.toys import CharTokenizer, toy_decoder, toy_job
from tests.tolerances import TOLERANCE

EXACT = TOLERANCE[torch.float32]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    torch.set_num_threads(1)
    if request.function is not test_a_run_records_every_step_and_evaluates_at_both_ends:
        monkeypatch.setattr(trainer, "plot", lambda *_: False)  # half a second each


class Told(Report):
    """Keeps all that it is told."""

    def __init__(self):
        self.total, self.lines, self.notes = None, [], []

    def begin(self, total_steps):
        self.total = total_steps

    def step(self, metrics):
        self.lines.append(metrics)

    def note(self, text):
        self.notes.append(text)


@dataclass
class Spoiled:
    """An objective that does something to call number `call` (from 0) of the true one."""

    true: object
    spoil: object
    call: int = 0

    def loss(self, model, batch, rng):
        loss, parts = self.true.loss(model, batch, rng)
        self.call += 1
        return self.spoil(self.call - 1, batch, loss), parts


def go(job, report=None, governor=None, spoil=None):
    """Train the job on the toy model; the result and the assembly."""
    assembly = assemble(job, toy_decoder())
    if spoil:
        assembly.objective = Spoiled(assembly.objective, spoil)
    dataset = read_dataset(job, CharTokenizer())
    return train(job, assembly, dataset, report or Told(), governor), assembly


def weights(assembly):
    return torch.cat([p.detach().reshape(-1) for _, p in assembly.parameters])


def test_a_run_records_every_step_and_evaluates_at_both_ends(tmp_path):
    report = Told()
    result, _ = go(toy_job(tmp_path, steps=8, lr=0.02), report)
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert lines == report.lines and report.total == 8 == result.steps and not result.stopped
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    steps = [line for line in lines if "loss" in line]
    assert {"grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "micro_batch", "memory_bytes"} < set(steps[0])
    assert steps[-1]["tokens"] == result.progress.tokens > 8 * 6 * 30
    assert lines[0]["held_out_loss"] == result.progress.held_out_before
    assert lines[-1]["held_out_loss"] == result.progress.held_out_after < result.progress.held_out_before
    assert result.checkpoint == tmp_path / "out" / "checkpoints" / "step-000008"
    assert (tmp_path / "out" / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_the_learning_rate_is_the_schedules_share_of_the_peak(tmp_path):
    result, assembly = go(toy_job(tmp_path, steps=5, schedule="cosine"))
    lines = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "lr" in line]
    assert [line["lr"] for line in lines] == [0.01 * assembly.schedule.at(s, 5) for s in range(5)]


def test_epochs_decide_the_steps_and_every_row_is_seen(tmp_path):
    job = toy_job(tmp_path, steps=0, epochs=2.0)
    dataset = read_dataset(job, CharTokenizer())
    result, _ = go(job)
    assert result.steps == math.ceil(2 * len(dataset.train) / 6)
    assert result.progress.tokens == 2 * dataset.train.tokens


def test_evaluations_and_checkpoints_come_as_often_as_asked(tmp_path):
    go(toy_job(tmp_path, steps=6, eval_every=2, save_every=4))
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 2, 4, 6]
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").glob("step-*")) == ["step-000004", "step-000006"]


def test_the_same_seed_gives_the_same_run_and_leaves_the_callers_randomness_alone(tmp_path):
    job = toy_job(tmp_path, adapter="lora:rank=4,dropout=0.2")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights(go(job.replace(out=str(tmp_path / "a")))[1])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, weights(go(job.replace(out=str(tmp_path / "b")))[1]))
    assert not torch.equal(first, weights(go(job.replace(out=str(tmp_path / "c"), seed=1))[1]))


class Signals(Governor):
    """Sends this process a signal before some steps, as a user at the keyboard does."""

    def __init__(self, *steps):
        self.steps, self.step = steps, 0

    def before_step(self, rows):
        for _ in range(self.steps.count(self.step)):
            os.kill(os.getpid(), signal.SIGINT)
        self.step += 1
        return rows


def test_ctrl_c_finishes_the_step_saves_and_the_resumed_run_is_the_undisturbed_one(tmp_path):
    job, report = toy_job(tmp_path), Told()
    whole = weights(go(job.replace(out=str(tmp_path / "whole")))[1])
    result, _ = go(job, report, Signals(2))
    assert result.stopped and result.progress.step == 3 and result.checkpoint.name == "step-000003"
    assert any("stopping after this step" in note for note in report.notes)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result, assembly = go(job.replace(resume=True))
    assert not result.stopped and torch.equal(weights(assembly), whole)


def test_a_second_ctrl_c_aborts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(toy_job(tmp_path), governor=Signals(2, 2))


def test_a_finished_run_resumed_changes_nothing(tmp_path):
    _, assembly = go(toy_job(tmp_path))
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    saved = max((tmp_path / "out/checkpoints").glob("step-*"))
    written = (saved / "manifest.json").stat().st_mtime_ns
    result, again = go(toy_job(tmp_path, resume=True))
    assert not result.stopped and torch.equal(weights(assembly), weights(again))
    assert result.checkpoint == saved and (saved / "manifest.json").stat().st_mtime_ns == written
    assert read_metrics(tmp_path / "out" / "metrics.jsonl") == lines


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_are_spoiled(tmp_path, bad):
    job = toy_job(tmp_path, save_every=2, eval_share=0.0)
    seen = []

    def spoil(call, batch, loss):
        return loss * bad if call == 3 else loss

    assembly = assemble(job, toy_decoder())
    assembly.objective = Spoiled(assembly.objective, spoil)
    step = assembly.optimizer.step
    assembly.optimizer.step = lambda closure: (step(closure), seen.append(weights(assembly)))[0]
    with pytest.raises(Diverged, match=r"step 4: loss is .*step-000002.*lower lr than 0\.01") as caught:
        train(job, assembly, read_dataset(job, CharTokenizer()))
    assert caught.value.exit_code == 2 and len(seen) == 3
    assert torch.equal(weights(assembly), seen[-1]) and weights(assembly).isfinite().all()


def test_weights_that_an_update_spoiled_are_never_saved(tmp_path):
    with pytest.raises(Diverged, match="no longer finite; no checkpoint was saved yet"):
        go(toy_job(tmp_path, lr=1e38, steps=1, schedule="constant", adapter="none", optimizer="adamw:weight_decay=1.0"))
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))


def test_shortage_of_memory_cuts_the_rows_and_changes_no_result(tmp_path):
    job = toy_job(tmp_path, adapter="lora:rank=4,dropout=0.1")
    expected = weights(go(job.replace(out=str(tmp_path / "small"), micro_batch=2))[1])

    def refuse(call, batch, loss):
        if sum(batch.lengths) - batch.filler > 2 * job.context:
            raise RuntimeError("satchel memory budget: 3 GiB asked, 2 GiB left")
        return loss

    report = Told()
    result, assembly = go(job, report, spoil=refuse)
    assert torch.equal(weights(assembly), expected) and result.progress.micro_batch == 2
    assert [n for n in report.notes if "out of memory" in n] == [
        "out of memory with 6 rows at once; going on with 3",
        "out of memory with 3 rows at once; going on with 2",
    ]


def test_memory_that_runs_out_between_updates_ends_the_run_and_names_the_checkpoint(tmp_path):
    """A step that has changed a weight cannot be computed again."""
    job, calls = toy_job(tmp_path, save_every=2), []
    assembly = assemble(job, toy_decoder())
    (_, first), *_, (_, last) = assembly.parameters

    def update(parameter):
        parameter.data.mul_(2)
        torch.autograd.graph.increment_version(parameter)

    def fail(parameter):
        calls.append(parameter)
        if len(calls) == 3:
            raise MemoryError

    last.register_post_accumulate_grad_hook(update)
    first.register_post_accumulate_grad_hook(fail)
    with pytest.raises(JobError, match=r"step 3: out of memory with 6 rows .*step-000002.*Resume with micro_batch=3"):
        train(job, assembly, read_dataset(job, CharTokenizer()))


def test_memory_that_runs_out_in_the_update_ends_the_run_and_names_the_checkpoint(tmp_path):
    job, steps = toy_job(tmp_path, save_every=2), []
    assembly = assemble(job, toy_decoder())

    def fail(*_):
        steps.append(None)
        if len(steps) == 4:
            raise RuntimeError("satchel memory budget: 3 GiB asked, 2 GiB left")

    assembly.optimizer.register_step_post_hook(fail)
    with pytest.raises(JobError, match=r"step 4: out of memory while .* updated; .*step-000002.*Raise memory"):
        train(job, assembly, read_dataset(job, CharTokenizer()))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_one_row_that_does_not_fit_ends_the_run_with_a_cure(tmp_path, error):
    def refuse(call, batch, loss):
        raise error

    with pytest.raises(JobError, match="one row at a time; shorten context, raise memory"):
        go(toy_job(tmp_path), spoil=refuse)


def test_other_errors_are_not_mistaken_for_shortage_of_memory(tmp_path):
    def fail(call, batch, loss):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        go(toy_job(tmp_path), spoil=fail)


@pytest.mark.parametrize(
    "change", [{"lr": 0.02}, {"seed": 3}, {"adapter": "lora:rank=2"}, {"context": 32}, {"steps": 9}]
)
def test_a_resume_with_another_job_names_the_field(tmp_path, change):
    go(toy_job(tmp_path))
    (name, value), before = *change.items(), toy_job(tmp_path).to_dict()
    with pytest.raises(UserError, match=f"resume: {name} was {before[name]!r} and is {value!r}; restore it"):
        go(toy_job(tmp_path, resume=True, **change))


def test_a_resume_on_changed_data_or_model_is_refused(tmp_path):
    go(toy_job(tmp_path))
    job = toy_job(tmp_path, resume=True)
    decoder = toy_decoder()
    with torch.no_grad():
        decoder.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(UserError, match="the content of model='toy' has changed"):
        train(job, assemble(job, decoder), read_dataset(job, CharTokenizer()))
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(UserError, match="the content of data='.*' has changed"):
        go(job)


def test_a_resume_may_save_and_evaluate_at_other_steps(tmp_path):
    go(toy_job(tmp_path), governor=Signals(1))
    result, _ = go(toy_job(tmp_path, resume=True, save_every=2, eval_every=3))
    assert not result.stopped


def test_an_output_folder_that_is_not_empty_names_both_ways_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty; it holds no run of satchel's: name another --out"):
        go(toy_job(tmp_path))
    with pytest.raises(UserError, match="holds no run to resume; leave resume out"):
        go(toy_job(tmp_path, resume=True))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file; name a folder"):
        go(toy_job(tmp_path, out=str(tmp_path / "out" / "thesis.txt")))


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_and_says_so(tmp_path):
    job = toy_job(tmp_path)
    expected = weights(go(job.replace(out=str(tmp_path / "whole")))[1])

    def die(call, batch, loss):
        if call == 4:
            raise RuntimeError("power cut")
        return loss

    with pytest.raises(RuntimeError):
        go(job, spoil=die)
    report = Told()
    _, assembly = go(job.replace(resume=True), report)
    assert report.notes[0] == "no checkpoint had been saved: starting from step 0"
    assert torch.equal(weights(assembly), expected)
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_told_after_the_first_step_not_after_the_last(tmp_path, monkeypatch):
    from satchel.run import checkpoint

    usage = checkpoint.shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    report = Told()
    with pytest.raises(NoDisk, match="no disk left: needs .* free"):
        go(toy_job(tmp_path), report)
    assert not [line for line in report.lines if "loss" in line]
    assert not list(Path(tmp_path / "out" / "checkpoints").glob("*"))


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("way", ["blocking", "datastates"])
def test_a_disk_that_fills_up_during_a_save_ends_the_run_and_the_checkpoint_before_it_stays(
    tmp_path, monkeypatch, way, steps
):
    """The second save fails; in the background, that is told by one of the next steps, or by the end of the run."""
    from satchel.run import checkpoint

    write, files = checkpoint.write_pieces, []

    def full_in_the_second_checkpoint(path, pieces, see):
        files.append(path)
        if len(files) == 4:
            write(path, itertools.islice(pieces, 1), see)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, pieces, see)

    monkeypatch.setattr(checkpoint, "write_pieces", full_in_the_second_checkpoint)
    job, report = toy_job(tmp_path, save_every=2, checkpoint=way, steps=steps), Told()
    with pytest.raises(NoDisk, match="no disk left; free some .*kept: .*step-000002"):
        go(job, report)
    assert report.lines[-1]["step"] <= 6
    monkeypatch.undo()
    kept = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["latest", "step-000002"]
    _, assembly = go(job.replace(resume=True))
    assert torch.equal(weights(assembly), weights(go(job.replace(out=str(tmp_path / "whole")))[1]))


def test_a_run_that_ends_any_way_has_its_last_checkpoint_on_the_disk(tmp_path, monkeypatch):
    """Saved in the background, on a disk that takes as long as ten steps."""
    from satchel.run import checkpoint

    write = checkpoint.write_pieces

    def slow(path, pieces, see):
        time.sleep(0.2)
        write(path, pieces, see)

    monkeypatch.setattr(checkpoint, "write_pieces", slow)
    job = toy_job(tmp_path, checkpoint="datastates", save_every=2, eval_share=0.0)
    result, _ = go(job, governor=Signals(1))
    assert result.stopped and (result.checkpoint / "manifest.json").exists() and result.progress.step == 2

    def spoil(call, batch, loss):
        return loss * math.nan if call == 2 else loss

    with pytest.raises(Diverged, match="step 5: .*the last good checkpoint is .*step-000004"):
        go(job.replace(resume=True), spoil=spoil)

    def fail(call, batch, loss):
        if call == 1:
            raise ZeroDivisionError
        return loss

    job = job.replace(out=str(tmp_path / "other"), save_every=1)
    with pytest.raises(ZeroDivisionError):
        go(job, spoil=fail)
    assert [path.name for path in (tmp_path / "other" / "checkpoints").glob("[!l]*")] == ["step-000001"]


def test_a_run_goes_on_from_whatever_way_its_checkpoint_was_saved(tmp_path):
    job = toy_job(tmp_path)
    whole = weights(go(job.replace(out=str(tmp_path / "whole")))[1])
    for number, ways in enumerate([("blocking", "datastates"), ("datastates", "blocking")]):
        first, second = (job.replace(out=str(tmp_path / str(number)), checkpoint=way) for way in ways)
        assert go(first, governor=Signals(2))[0].stopped
        assert torch.equal(weights(go(second.replace(resume=True))[1]), whole)
