"""The tune job: one frozen dataclass that TOML, the command line and Python all make.

The comment behind each field is its help text, wherever it is shown.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satchel.core import book
from satchel.core.errors import UnknownName, UserError
from satchel.core.knobs import REQUIRED, Knob, read_knobs
from satchel.core.units import parse_bytes

METHOD_FIELDS = ("adapter", "optimizer", "schedule", "activations", "format", "objective")  # each named after its slot


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """Everything that a tuning run depends on. Always valid: a bad value raises UserError when the job is made."""

    model: str  # 'demo', a Hugging Face folder, a .gguf file, or a hub id
    data: str  # .jsonl, .parquet or .txt file, a folder of them, or 'demo': Python's own language reference
    out: str = "runs/tune"  # folder that receives adapter or model, metrics and receipt
    eval_data: str = ""  # held-out data; empty: eval_share of the data
    eval_share: float = 0.05  # share of the documents held out, [0, 0.5]
    eval_rows: int = 128  # rows of `context` tokens that an evaluation takes at most, drawn once; 0: all held out
    device: str = "auto"  # auto, cpu or cuda
    memory: str = "auto"  # what the job may use, such as 1.5GiB; auto: what the machine has free now
    dtype: str = "bf16"  # of the weights: bf16 or fp32
    adapter: str = "lora"  # such as lora:rank=8,alpha=16; none tunes all weights
    optimizer: str = "adamw"  # such as galore:rank=64
    schedule: str = "cosine"  # of the learning rate
    activations: str = "none"  # what is recomputed instead of kept: none, selective, full
    format: str = "none"  # storage of the frozen weights under an adapter, such as int8, nf4, int4:group=64
    objective: str = "causal_lm"  # what the run minimises
    lr: float = 0.0  # peak learning rate; 0: 1e-3 with an adapter, 1e-4 without
    context: int = 1024  # longest sequence, tokens
    batch: int = 8  # rows of `context` tokens that an optimizer step sees
    micro_batch: int = 0  # rows at once; 0: the largest that fits
    packing: bool = True  # several documents in a row, without attention between them
    steps: int = 0  # optimizer steps; 0: `epochs` decides
    epochs: float = 1.0  # passes over the data
    clip: float = 1.0  # gradient norm above which it is scaled down; 0: never
    seed: int = 0  # of everything random in the job
    eval_every: int = 0  # optimizer steps between evaluations; 0: at the start and the end
    save_every: int = 0  # optimizer steps between checkpoints; 0: at the end and on ctrl-C
    resume: bool = False  # go on from the last checkpoint in `out`
    merge: bool = False  # also write the merged model

    def __post_init__(self) -> None:
        for name, holds, cure in _bounds(self):
            if not holds:
                raise UserError(f"job: {name}={getattr(self, name)!r} is not allowed; {cure}")
        if self.memory != "auto":
            parse_bytes(self.memory)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for slot in METHOD_FIELDS:
            if getattr(self, slot) != defaults[slot]:
                book.check(slot, getattr(self, slot))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "job") -> TuneJob:
        """A job from plain values. Raises UnknownName for a key, UserError for a type, a range or a missing key."""
        known = {knob.name: knob for knob in job_knobs()}
        for name in values:
            if name not in known:
                raise UnknownName("key", name, known, where)
        for name, knob in known.items():
            if knob.default is REQUIRED and not values.get(name):
                raise UserError(f"{where}: '{name}' is missing; it is {knob.comment}")
        return cls(**{name: known[name].accept(value, where) for name, value in values.items()})

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> TuneJob:
        """A job from a TOML file whose keys are the fields' names; `overrides` win. Raises UserError."""
        return cls.from_dict(read_toml(path) | overrides, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for `from_dict`."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> TuneJob:
        """The job with other values; checked as a new one is."""
        return dataclasses.replace(self, **changes)


def job_knobs() -> tuple[Knob, ...]:
    """The job's fields with the comments behind them."""
    return read_knobs(Path(__file__), "TuneJob")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The keys of a job file. Raises UserError if it is not there or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as fault:
        raise UserError(
            f"{path}: cannot be read: {fault.strerror}; a job file holds lines such as model = 'demo'"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: is not TOML: {fault}") from None


def _bounds(job: TuneJob) -> list[tuple[str, bool, str]]:
    """(field, whether its value is allowed, what would be)."""
    at_least_zero = ("lr", "clip", "micro_batch", "steps", "seed", "eval_rows", "eval_every", "save_every")
    return [
        ("model", bool(job.model), "name a model, such as 'demo'"),
        ("data", bool(job.data), "name a file or folder of text, or 'demo'"),
        ("out", bool(job.out), "name a folder, such as runs/tune"),
        ("eval_share", 0 <= job.eval_share <= 0.5, "it lies in [0, 0.5]; 0.05 holds one document in twenty out"),
        ("device", job.device in ("auto", "cpu", "cuda"), "it is auto, cpu or cuda"),
        ("dtype", job.dtype in ("bf16", "fp32"), "it is bf16 or fp32"),
        ("context", job.context >= 2, "a sequence has at least 2 tokens"),
        ("batch", job.batch >= 1, "a step sees at least 1 row"),
        ("micro_batch", job.micro_batch <= job.batch, f"it is at most batch={job.batch}"),
        ("epochs", 0 < job.epochs < float("inf"), "it is above 0; 0.5 is half of the data"),
        *((name, 0 <= getattr(job, name) < float("inf"), "it is 0 or above") for name in at_least_zero),
        ("format", job.format == "none" or job.adapter != "none", "packed weights cannot be tuned; add an adapter"),
    ]
