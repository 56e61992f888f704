"""The training loop: one for all methods, resumable at any step bit for bit.

What a step computes is a function of the weights, the optimizer's state, the seed and the step's number alone: the rows
(`packing`), the randomness (reseeded every step) and the learning rate. So a checkpoint holds no loader and no
generator, and a step that ran out of memory is tried again in smaller pieces with the same result.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from satchel.core.errors import Diverged, JobError, SatchelError, UserError
from satchel.core.job import TrainJob
from satchel.core.report import SILENT, Report
from satchel.model.batch import Batch
from satchel.run.assemble import Assembly
from satchel.run.checkpoint import KEPT, Checkpoints, find_saved, pull_tensors, push_tensors
from satchel.run.data import Dataset
from satchel.run.folder import claim, fingerprint
from satchel.run.governor import Governor, ran_out
from satchel.run.interrupt import Interrupt
from satchel.run.metrics import FILE, MetricsLog, read_metrics
from satchel.run.packing import Rows, Stream
from satchel.run.plot import plot
from satchel.run.step import StepLoss, mean_loss, take_step

T = TypeVar("T")


@dataclass
class Progress:
    """How far a run has come; what a checkpoint keeps beside the tensors."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0  # fed so far
    seconds: float = 0.0  # at work, those before a resume included
    micro_batch: int = 0  # rows at once
    first_loss: float | None = None
    last_loss: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None  # at the last evaluation
    evaluated: int = -1  # the step of the last evaluation


@dataclass(frozen=True)
class TrainResult:
    """A finished or interrupted run."""

    progress: Progress
    steps: int  # of the whole job
    checkpoint: Path  # of the last finished step

    @property
    def stopped(self) -> bool:
        """Whether ctrl-C ended the run before its last step."""
        return self.progress.step < self.steps


def train(
    job: TrainJob, assembly: Assembly, dataset: Dataset, report: Report = SILENT, governor: Governor | None = None
) -> TrainResult:
    """Run the job to its last step, or from its last checkpoint if `job.resume`, or until ctrl-C.

    Raises UserError if the output folder belongs to another job, Diverged if the loss is no number, NoDisk if
    the disk is full.
    """
    return Trainer(job, assembly, dataset, report, governor or Governor()).run()


class Trainer:
    """The state of one run."""

    def __init__(self, job: TrainJob, assembly: Assembly, dataset: Dataset, report: Report, governor: Governor) -> None:
        self.job, self.assembly, self.dataset, self.report, self.governor = job, assembly, dataset, report, governor
        self.out = Path(job.out)
        self.device = assembly.parameters[0][1].device
        self.steps, self.rows = dataset.train.length(job.batch, job.steps, job.epochs)
        self.checkpoints = Checkpoints(self.out / "checkpoints", assembly.saver, report.note)
        self.progress = Progress(micro_batch=job.micro_batch or job.batch)

    def run(self) -> TrainResult:
        """See `train`."""
        claim(self.job, self.dataset.fingerprint(), fingerprint(self.assembly.model))
        restored = self._restore() if self.job.resume or self.job.branch else None
        if not self.job.resume:
            for text in self.dataset.notes:
                self.report.note(text)
        self.report.begin(self.steps)
        with (
            MetricsLog(self.out, self.progress.step) as self.log,
            Interrupt(self.report.note) as interrupt,
            self.checkpoints,
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
        ):
            path = self._loop(interrupt, restored)
        self.governor.relax()
        plot(read_metrics(self.out / FILE), self.out / "metrics.png")
        return TrainResult(self.progress, self.steps, path)

    def _loop(self, interrupt: Interrupt, path: Path | None) -> Path:
        """All steps that are left, from the checkpoint at `path`; the path of the last checkpoint."""
        progress = self.progress
        if path is None:
            self._evaluate()
        while progress.step < self.steps and not interrupt.asked:
            self._step()
            path = None
            if self._due(self.job.eval_every):
                self._evaluate()
            if self._due(self.job.save_every):
                path = self._save()
        if progress.step == self.steps:
            self._evaluate()
        return path or self._save()

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _step(self) -> None:
        """One optimizer step and its line of metrics. Raises Diverged before the weights take in what is no number."""
        progress, began = self.progress, time.perf_counter()
        rows = self.dataset.train.step_rows(progress.step, self.job.batch, self.job.seed, self.rows)
        lr = self.assembly.lr * self.assembly.schedule.at(progress.step, self.steps)
        progress.micro_batch = self.governor.before_step(progress.micro_batch)

        tokens = 0

        def micro_batches() -> list[Batch]:
            nonlocal tokens
            self._reseed()
            batches = [b.filled().to(self.device) for b in self.dataset.train.batches(rows, progress.micro_batch)]
            tokens = sum(sum(b.lengths) - b.filler for b in batches)
            return batches

        closure = StepLoss(self.assembly, micro_batches, self._in_memory, self._require_finite)
        metrics = {name: float(value) for name, value in self._whole(lambda: take_step(closure, lr)).items()}
        if progress.step == 0:
            self.checkpoints.require_space(self._state()[1], copies=KEPT + 1)  # a late failure would cost the run
        seconds = time.perf_counter() - began
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        progress.last_loss = metrics["loss"]
        progress.first_loss = progress.first_loss if progress.first_loss is not None else metrics["loss"]
        self._record(
            metrics
            | {"lr": lr, "tokens": progress.tokens, "seconds": progress.seconds}
            | {"tokens_per_second": tokens / seconds, "micro_batch": progress.micro_batch}
            | {"memory_bytes": self.governor.memory_bytes()}
        )

    def _evaluate(self) -> None:
        """The loss on held-out data, unless there is none or it is known for this step."""
        progress, held_out = self.progress, self.dataset.held_out
        if not len(held_out) or progress.evaluated == progress.step:
            return
        began = time.perf_counter()
        losses = self._in_memory(lambda: {name: self._mean_loss(rows) for name, rows in held_out.domains().items()})
        progress.seconds += time.perf_counter() - began
        loss = _overall(losses, held_out)
        progress.evaluated, progress.held_out_after = progress.step, loss
        if progress.held_out_before is None:
            progress.held_out_before = loss
        self._record({"held_out_loss": loss} | {f"held_out_loss/{name}": each for name, each in losses.items() if name})

    def _mean_loss(self, held_out: Rows) -> float:
        batches = held_out.in_order(self.progress.micro_batch)
        return mean_loss(self.assembly, (batch.filled().to(self.device) for batch in batches))

    def _in_memory(self, compute: Callable[[], T]) -> T:
        """The result of `compute`, which is called again with fewer rows at once whenever memory ran out.

        Raises JobError if the failed call has changed weights, as one that updates within the backward pass does: what
        it computed first cannot be computed again.
        """
        while True:
            before = self._versions()
            try:
                return compute()
            except Exception as error:
                fewer = self.governor.after_failure(error, self.progress.micro_batch)
                if self._versions() != before:
                    self._fail(
                        JobError,
                        f"step {self.progress.step + 1}: out of memory with {self.progress.micro_batch} rows at once, "
                        "and some weights had been updated",
                        f"Resume with micro_batch={fewer}",
                    )
            # Out of the handler the failed call's tensors are gone.
            self.report.note(f"out of memory with {self.progress.micro_batch} rows at once; going on with {fewer}")
            self.progress.micro_batch = fewer

    def _whole(self, step: Callable[[], T]) -> T:
        """The result of `step`. Raises JobError if memory ran out in its update, half of which may have been made."""
        try:
            return step()
        except Exception as error:
            if isinstance(error, SatchelError) or not ran_out(error):
                raise
            what = f"step {self.progress.step + 1}: out of memory while the weights were updated"
            self._fail(JobError, what, "Raise memory, or take an optimizer of less state: `satchel list optimizer`")

    def _versions(self) -> list[int]:
        """A number for each parameter that rises whenever it is written to."""
        return [parameter._version for _, parameter in self.assembly.parameters]

    def _record(self, metrics: dict[str, float]) -> None:
        line = {"step": self.progress.step} | metrics
        self.log.write(line)
        self.report.step(line)

    def _reseed(self) -> None:
        """Make all randomness of a step a function of the seed and the step."""
        digest = hashlib.blake2b(f"{self.job.seed}/{self.progress.step}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))
        if self.assembly.rng is not None:
            self.assembly.rng.manual_seed(int.from_bytes(digest, "little"))

    def _require_finite(self, name: str, value: Tensor) -> None:
        if not math.isfinite(value):
            self._diverged(f"step {self.progress.step + 1}: {name} is {float(value)}")

    def _diverged(self, what: str) -> None:
        self._fail(
            Diverged,
            what,
            f"Try a lower lr than {self.assembly.lr:g}, a schedule with warm-up, a smaller clip, "
            f"or look into the data of that step",
        )

    def _fail(self, kind: type[SatchelError], what: str, cure: str) -> NoReturn:
        kept = self.checkpoints.newest() if self.checkpoints.folder.exists() else None
        where = f"the last good checkpoint is {kept.folder}" if kept else "no checkpoint was saved yet"
        raise kind(f"{what}; {where}. {cure}")

    def _save(self) -> Path:
        for name, parameter in self.assembly.parameters:
            if not torch.linalg.vector_norm(parameter.detach()).isfinite():
                self._diverged(f"step {self.progress.step}: '{name}' is no longer finite")
        state, files = self._state()
        return self.checkpoints.save(self.progress.step, state, files)

    def _state(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """JSON values and tensors that a checkpoint holds."""
        moments: dict[str, Tensor] = {}
        optimizer = pull_tensors(self.assembly.optimizer.state_dict(), moments)
        state = {"progress": asdict(self.progress), "optimizer": optimizer}
        return state, {"parameters": self.assembly.lasting, "optimizer": moments}

    def _restore(self) -> Path | None:
        """Go on from this run's newest checkpoint, whose folder it returns, or else from where the job branches off."""
        own = self.checkpoints.newest() if self.job.resume else None
        saved = own or (find_saved(Path(self.job.branch)) if self.job.branch else None)
        if saved is None:
            self.report.note("no checkpoint had been saved: starting from step 0")
            return None
        saved.read_into("parameters", self.assembly.lasting)
        moments = saved.read("optimizer", self.device)
        self.assembly.optimizer.load_state_dict(push_tensors(saved.state["optimizer"], moments))
        now, self.progress = self.progress, Progress(**saved.state["progress"])
        self.progress.micro_batch = min(self.progress.micro_batch, now.micro_batch)  # what fits now may be less
        self.report.note(f"going on from step {self.progress.step} of {self.steps}")
        if own is None:
            self._begin_anew()
        return saved.folder if own else None

    def _begin_anew(self) -> None:
        """What was measured belongs to the run that this one branches off from. Raises UserError if no step is left."""
        if self.progress.step >= self.steps:
            where = f"the checkpoint is at step {self.progress.step}"
            raise UserError(f"branch: {where} and the job has {self.steps} steps; name an earlier one, or more steps")
        self.progress.held_out_before, self.progress.evaluated = None, -1


def _overall(losses: dict[str, float], held_out: Stream) -> float:
    """The mean loss over the tokens of all sources."""
    if len(losses) == 1:
        return next(iter(losses.values()))
    return sum(losses[name] * rows.tokens for name, rows in held_out.domains().items()) / held_out.tokens
