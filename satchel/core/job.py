"""The jobs: frozen dataclasses that TOML, the command line and Python all make.

The comment behind each field is its help text, wherever it is shown. What all share is `Job`, what training shares is
`TrainJob`; a kind adds its own fields, and may change a default or a meaning by naming the field again.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from satchel.core import book
from satchel.core.errors import UserError
from satchel.core.knobs import Knob, accept_all, read_knobs
from satchel.core.units import parse_bytes

# Each is named after its slot.
METHOD_FIELDS = ("adapter", "optimizer", "schedule", "activations", "format", "objective", "checkpoint", "surgery")
LR_ADAPTER, LR_FULL, LR_SCRATCH = 1e-3, 1e-4, 1e-3  # peak learning rates of a job that names none

Bound = tuple[str, bool, str]  # field, whether its value is allowed, what would be


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every job depends on. Always valid: a bad value raises UserError when the job is made."""

    slots: ClassVar[tuple[str, ...]]  # fields that hold a method, each named after its slot

    model: str  # 'demo', a Hugging Face folder, a .gguf file, or a hub id
    device: str = "auto"  # auto, cpu or cuda
    memory: str = "auto"  # what the job may use, such as 1.5GiB; auto: what the machine has free now
    dtype: str = "bf16"  # of the weights: bf16 or fp32
    seed: int = 0  # of everything random in the job

    def __post_init__(self) -> None:
        for name, holds, cure in self.bounds():
            if not holds:
                raise UserError(f"job: {name}={getattr(self, name)!r} is not allowed; {cure}")
        if self.memory != "auto":
            parse_bytes(self.memory)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for slot in self.slots:
            if getattr(self, slot) != defaults[slot]:
                book.check(slot, getattr(self, slot))

    @classmethod
    def knobs(cls) -> tuple[Knob, ...]:
        """The fields with the comments behind them."""
        lineage = [base for base in reversed(cls.__mro__) if issubclass(base, Job)]
        found = (knob for base in lineage for knob in read_knobs(Path(inspect.getfile(base)), base.__name__))
        return tuple({knob.name: knob for knob in found}.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "job") -> Self:
        """A job from plain values. Raises UnknownName for a key, UserError for a type, a range or a missing key."""
        return cls(**accept_all(cls.knobs(), values, where))

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> Self:
        """A job from a TOML file whose keys are the fields' names; `overrides` win. Raises UserError."""
        return cls.from_dict(read_toml(path) | overrides, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for `from_dict`."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Self:
        """The job with other values; checked as a new one is."""
        return dataclasses.replace(self, **changes)

    def bounds(self) -> Iterator[Bound]:
        """What must hold of the fields."""
        yield "model", bool(self.model), "name a model, such as 'demo'"
        yield "device", self.device in ("auto", "cpu", "cuda"), "it is auto, cpu or cuda"
        yield "dtype", self.dtype in ("bf16", "fp32"), "it is bf16 or fp32"
        yield "seed", self.seed >= 0, "it is 0 or above"


@dataclass(frozen=True, kw_only=True)
class TrainJob(Job):
    """What every training run depends on."""

    verb: ClassVar[str]
    slots: ClassVar[tuple[str, ...]] = METHOD_FIELDS

    data: str | tuple[str, ...]  # what it learns from
    out: str = "runs"  # folder that receives adapter or model, metrics and receipt
    eval_data: str | tuple[str, ...] = ""  # held-out data
    eval_share: float = 0.05  # share of the documents held out, [0, 0.5]
    eval_rows: int = 128  # rows of `context` tokens that an evaluation takes at most, drawn once; 0: all held out
    adapter: str = "none"  # such as lora:rank=8,alpha=16; none trains all weights
    optimizer: str = "adamw"  # such as galore:rank=64
    schedule: str = "cosine"  # of the learning rate
    activations: str = "none"  # what is recomputed instead of kept: none, selective, full
    format: str = "none"  # storage of the frozen weights under an adapter, such as int8, nf4, int4:group=64
    surgery: str = "none"  # what is done to the weights before they train, such as spdf:sparsity=0.75
    objective: str = "causal_lm"  # what the run minimises
    checkpoint: str = "blocking"  # how a checkpoint reaches the disk; datastates: while the next step computes
    lr: float = 0.0  # peak learning rate; 0: the optimizer's usual, of most 1e-3 with an adapter, 1e-4 without
    context: int = 1024  # longest sequence, tokens
    batch: int = 8  # rows of `context` tokens that an optimizer step sees
    micro_batch: int = 0  # rows at once; 0: the largest that fits
    steps: int = 0  # optimizer steps; 0: `epochs` decides
    epochs: float = 1.0  # passes over the data
    clip: float = 1.0  # gradient norm above which it is scaled down; 0: never
    eval_every: int = 0  # optimizer steps between evaluations; 0: at the start and the end
    save_every: int = 0  # optimizer steps between checkpoints; 0: at the end and on ctrl-C
    resume: bool = False  # go on from the last checkpoint in `out`
    branch: str = ""  # another run's checkpoint to go on from, optimizer and all: runs/a/checkpoints/step-000800
    merge: bool = False  # also write the merged model

    @property
    def peak_lr(self) -> float:
        """The learning rate at the schedule's peak: the one given, or what is usual for such a job."""
        return self.lr or (LR_FULL if self.adapter == "none" else LR_ADAPTER)

    def bounds(self) -> Iterator[Bound]:
        """See `Job`."""
        yield from super().bounds()
        at_least_zero = ("lr", "clip", "micro_batch", "steps", "eval_rows", "eval_every", "save_every")
        yield "data", bool(self.data), "name a file or folder of text, or 'demo'"
        yield "out", bool(self.out), "name a folder, such as runs/tune"
        yield "eval_share", 0 <= self.eval_share <= 0.5, "it lies in [0, 0.5]; 0.05 holds one document in twenty out"
        yield "context", self.context >= 2, "a sequence has at least 2 tokens"
        yield "batch", self.batch >= 1, "a step sees at least 1 row"
        yield "micro_batch", self.micro_batch <= self.batch, f"it is at most batch={self.batch}"
        yield "epochs", 0 < self.epochs < math.inf, "it is above 0; 0.5 is half of the data"
        for name in at_least_zero:
            yield name, 0 <= getattr(self, name) < math.inf, "it is 0 or above"
        packed = self.format != "none" and self.adapter == "none"
        yield "format", not packed, "packed weights cannot be tuned; add an adapter"
        cut = self.surgery != "none" and self.adapter != "none"
        yield (
            "surgery",
            not cut,
            "it changes the weights that train, and under an adapter none do; leave one of them out",
        )


@dataclass(frozen=True, kw_only=True)
class TuneJob(TrainJob):
    """Everything that a tuning run depends on."""

    verb: ClassVar[str] = "tune"

    data: str  # .jsonl, .parquet or .txt file, a folder of them, or 'demo': Python's own language reference
    out: str = "runs/tune"  # folder that receives adapter or model, metrics and receipt
    eval_data: str = ""  # held-out data; empty: eval_share of the data
    adapter: str = "lora"  # such as lora:rank=8,alpha=16; none tunes all weights
    packing: bool = True  # several documents in a row, without attention between them

    @property
    def paths(self) -> tuple[str, ...]:
        """Where all of its data lies."""
        return (self.data, self.eval_data) if self.eval_data else (self.data,)


@dataclass(frozen=True, kw_only=True)
class PretrainJob(TrainJob):
    """Everything that a pre-training run depends on, from random weights or from a model: plain text, in a mixture."""

    verb: ClassVar[str] = "pretrain"
    slots: ClassVar[tuple[str, ...]] = (*METHOD_FIELDS, "mixture", "selector")

    data: tuple[str, ...]  # sources of text, each with its weight in the mixture: wiki.jsonl:0.7; without: by size
    out: str = "runs/pretrain"  # folder that receives the model, metrics and receipt; tokens are kept beside it
    eval_data: tuple[str, ...] = ()  # sources that are only evaluated, beside eval_share of each source of `data`
    eval_share: float = 0.01  # share of each source's documents held out, [0, 0.5]
    eval_rows: int = 128  # rows of `context` tokens that an evaluation takes of a source at most, drawn once; 0: all
    lr: float = 0.0  # peak learning rate; 0: 1e-3 from random weights or with an adapter, 1e-4 otherwise
    context: int = 1024  # tokens of a row; documents are laid end to end and cut where a row ends
    epochs: float = 1.0  # passes over as many tokens as all sources hold; how many over each, the mixture decides
    scratch: bool = False  # begin with random weights; of the model only config.json is read
    tokenizer: str = ""  # a model whose tokenizer to use; empty: the model's own
    mixture: str = "fixed"  # how the sources' shares move over the run
    selector: str = "none"  # which documents of the sources are trained on, such as ngram:keep=0.25

    @property
    def peak_lr(self) -> float:
        """See `Job`."""
        return self.lr or (LR_SCRATCH if self.scratch else super().peak_lr)

    @property
    def sources(self) -> tuple[tuple[str, float | None], ...]:
        """Path and weight of each source; None where no weight is given."""
        return tuple(map(weighted, self.data))

    @property
    def paths(self) -> tuple[str, ...]:
        """Where all of its data lies."""
        return (*(path for path, _ in self.sources), *self.eval_data)

    def bounds(self) -> Iterator[Bound]:
        """See `Job`."""
        yield from super().bounds()
        yield "data", all(self.data), "name files or folders of text"
        weights = [weight for _, weight in self.sources]
        given = [weight for weight in weights if weight is not None]
        yield "data", len(given) in (0, len(weights)), "give a weight to every source, or to none"
        sound = all(0 <= weight < math.inf for weight in given) and (not given or sum(given) > 0)
        yield "data", sound, "weights are 0 or above, and one of them is above 0"
        yield "data", len(set(self.paths)) == len(self.paths), "name each source once, in data or in eval_data"
        adapted = self.scratch and self.adapter != "none"
        yield "scratch", not adapted, "random weights are trained themselves; leave the adapter out"


def weighted(source: str) -> tuple[str, float | None]:
    """`wiki.jsonl:0.7` as path and weight; None if it names no weight."""
    path, colon, tail = source.rpartition(":")
    try:
        return (path, float(tail)) if colon and path else (source, None)
    except ValueError:
        return source, None


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
