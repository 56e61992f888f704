"""One row of bench/plan, in a process of its own: plan a job, run it, print both as JSON.

    python -m bench._plan_run '{"hf": {...}, "job": {...}, "lengths": [...]}'

A job of the model `demo` trains the packaged weights, `layers` of them; any other gets random weights of the
configuration `hf`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench._harness import median
from satchel.core.book import make
from satchel.core.job import TuneJob
from satchel.model.batch import Batch
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.load import fill, load
from satchel.model.save import outgoing
from satchel.model.source import Source, find_source
from satchel.model.stored import FakeReader, Part
from satchel.run.assemble import Assembly, assemble
from satchel.run.device import device
from satchel.run.memory import Pool, install_pool, peak_resident_bytes, reset_peak_resident
from satchel.run.planner import plan
from satchel.run.rehearse import DTYPES
from satchel.run.rung import Extent, Rung
from satchel.run.step import mean_loss, train_step
from satchel.run.tune import tune  # noqa: F401 - the planner measures a process that holds what a tune job's holds

STEPS = 4  # at least; the first, which warms up, is not timed
TIMED_S = (
    12  # at least: over two seconds the same step differs by a tenth on a shared machine, over sixteen by half that
)
NO_LIMIT = "1TiB"


class RandomWeights(FakeReader):
    """Reads a parameter of any name from a generator, in place."""

    def __init__(self) -> None:
        super().__init__({})

    def read(self, part: Part, out: Tensor) -> None:
        """Matrices are drawn; norms and biases stay near neutral."""
        with torch.no_grad():
            out.normal_(0, 0.02) if out.dim() > 1 else out.fill_(0.5)


def main(case: dict) -> None:
    """Print the row as JSON."""
    pool = install_pool()
    if pool is None:
        raise SystemExit("bench/plan counts bytes in the page pool, which needs Linux and a C++ compiler")
    device("cpu")  # measured before, so that no curve is measured while the planner is timed
    source, config = model(case)
    job = TuneJob(**case["job"], memory=NO_LIMIT)
    start = time.perf_counter()
    rung = plan(job, config, Extent(tuple(case.get("lengths", ()))), look_for_smallest=False).require()
    rehearsal_s = time.perf_counter() - start
    reset_peak_resident()
    measured = run(rung.job, source or config, tuple(case.get("lengths", ())), pool, timed_s=TIMED_S)
    print(json.dumps(_row(rung, measured) | {"rehearsal_s": rehearsal_s, "parameters": config.parameters}))


def model(case: dict) -> tuple[Source | None, ModelConfig]:
    """Where the weights come from (None: nowhere), and the configuration."""
    if case["job"]["model"] != "demo":
        return None, ModelConfig.from_hf(case["hf"])
    source = find_source("demo")
    config = dataclasses.replace(source.config, layers=case.get("layers", source.config.layers))
    names = {name for name, _ in Decoder(config, device="meta").named_parameters()}
    parts = {name: part for name, part in source.parts.items() if name in names}
    tensors = {part.stored: source.tensors[part.stored] for part in parts.values()}
    return dataclasses.replace(source, config=config, parts=parts, tensors=tensors), config


def run(
    job: TuneJob,
    origin: Source | ModelConfig,
    lengths: tuple[int, ...],
    pool: Pool,
    steps: int = STEPS,
    timed_s: float = 0,
) -> dict:
    """Load, train, evaluate and (where all weights train) write the job; its peaks by phase and its times."""
    peaks: dict[str, int] = {}
    with _peak("load", pool, peaks):
        assembly = assemble(job, _load(job, origin))
    batches = [_batch(job, assembly, lengths) for _ in range(-(-job.batch // job.micro_batch))]
    with _peak("train", pool, peaks):
        times = [_timed(lambda: train_step(assembly, batches, assembly.lr)) for _ in range(steps)]
        while sum(wall_s for wall_s, _ in times[1:]) < timed_s:
            times.append(_timed(lambda: train_step(assembly, batches, assembly.lr)))
    with _peak("evaluate", pool, peaks):
        loss = mean_loss(assembly, batches[:1])
    with _peak("save", pool, peaks):
        _write(assembly)
    wall_s, cpu_s = (median(column) for column in zip(*times[1:], strict=True))
    return {"peaks": peaks, "resident": peak_resident_bytes(), "wall_s": wall_s, "cpu_s": cpu_s, "loss": loss}


def _row(rung: Rung, measured: dict) -> dict:
    phases = {phase.name: phase.peak_bytes for phase in rung.rehearsal.phases}
    return {
        "tensors": [rung.rehearsal.peak.peak_bytes, max(measured["peaks"].values())],
        "resident": [rung.peak_bytes, measured["resident"]],
        "seconds": [rung.seconds_per_step, measured["wall_s"]],
        "cpu_s": measured["cpu_s"],
        "loss": measured["loss"],
        "phases": {name: [phases[name], peak] for name, peak in measured["peaks"].items() if name in phases},
        "accounts": rung.accounts,
    }


@contextmanager
def _peak(phase: str, pool: Pool, peaks: dict[str, int]) -> Iterator[None]:
    pool.reset_peak()
    yield
    peaks[phase] = pool.peak_bytes


def _load(job: TuneJob, origin: Source | ModelConfig) -> Decoder:
    dtype, storage = DTYPES[job.dtype], make("format", job.format)
    if isinstance(origin, Source):
        return load(origin, dtype, "cpu", storage)
    shell = Decoder(origin, dtype, device="meta")
    parts = {name: Part(name) for name, _ in shell.named_parameters()}
    return fill(shell, parts, RandomWeights(), "cpu", storage)


def _batch(job: TuneJob, assembly: Assembly, lengths: tuple[int, ...]) -> Batch:
    lengths = (lengths or (job.context,)) * job.micro_batch
    tokens_1N = torch.randint(0, assembly.model.config.vocab, (1, sum(lengths)))
    return Batch(tokens_1N, tokens_1N.roll(-1), lengths, tokens_1N.numel())


def _write(assembly: Assembly) -> None:
    """What `export` does to the weights of a job that trains them all, without its files."""
    if assembly.adapter is None:
        for tensor in outgoing(assembly.model):
            tensor.make()


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
