"""The serve job: which model answers, inside which memory, and how its requests are ordered and its tokens found.

The comment behind each field is its help text, wherever it is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from satchel.core import book
from satchel.core.errors import UserError
from satchel.core.job import read_toml
from satchel.core.knobs import Knob, accept_all, read_knobs
from satchel.core.units import parse_bytes

TOGETHER = 8  # bodies of the largest size that may be held at once
PARSED = 24  # times its size that a body may take while it is read
METHOD_FIELDS = ("format", "admission", "preemption", "decoding", "skip", "kv")  # each named after its slot


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """Everything that an engine depends on. Always valid: a bad value raises UserError when the job is made."""

    slots: ClassVar[tuple[str, ...]] = METHOD_FIELDS  # fields that hold a method

    model: str  # 'demo', a Hugging Face folder, a .gguf file, or a hub id
    device: str = "auto"  # auto, cpu or cuda
    memory: str = "auto"  # what the process may use, such as 1GiB; auto: what the machine has free now
    dtype: str = "bf16"  # of the weights, and of keys and values as they are: bf16 or fp32
    format: str = "auto"  # storage of the weights, such as int8, int4:group=64; auto: on a CPU the file's own bits
    context: int = 0  # longest prompt and answer together, tokens; 0: what the model was made for
    batch: int = 32  # answers that grow at once, at most
    step_tokens: int = 512  # tokens that a step sees at most: long prompts are cut into parts of this
    admission: str = "fcfs"  # who runs next
    preemption: str = "recompute"  # what becomes of keys and values that lose their place
    decoding: str = "plain"  # how tokens are found
    skip: str = "none"  # which feed-forwards a token of an answer leaves out
    kv: str = "none"  # how keys and values lie in memory: int8 takes half of bf16; none: as they are
    adapters: str = ""  # folder whose subfolders are PEFT adapters, each served under its own name
    seed: int = 0  # of requests that bring none

    def __post_init__(self) -> None:
        for name, holds, cure in (
            ("model", bool(self.model), "name a model, such as 'demo'"),
            ("device", self.device in ("auto", "cpu", "cuda"), "it is auto, cpu or cuda"),
            ("dtype", self.dtype in ("bf16", "fp32"), "it is bf16 or fp32"),
            ("context", self.context == 0 or self.context >= 2, "a prompt and its answer have at least 2 tokens"),
            ("batch", self.batch >= 1, "at least 1 answer grows"),
            ("step_tokens", self.step_tokens >= self.batch, f"each of batch={self.batch} answers gets a token a step"),
            ("seed", self.seed >= 0, "it is 0 or above"),
        ):
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
        return serve_knobs()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "job") -> ServeJob:
        """A job from plain values. Raises UnknownName for a key, UserError for a type, a range or a missing key."""
        return cls(**accept_all(cls.knobs(), values, where))

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> ServeJob:
        """A job from a TOML file whose keys are the fields' names; `overrides` win. Raises UserError."""
        return cls.from_dict(read_toml(path) | overrides, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for `from_dict`."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> ServeJob:
        """The job with other values; checked as a new one is."""
        return dataclasses.replace(self, **changes)


def serve_knobs() -> tuple[Knob, ...]:
    """The job's fields with the comments behind them."""
    return read_knobs(Path(__file__), "ServeJob")


@dataclass(frozen=True)
class Terms:
    """What a client of a server may ask for."""

    queue: int = 256  # requests that may be open at once; more are told to come again
    body_bytes: int = 1 << 20  # longest body
    timeout_s: float = 600.0  # longest time from submission to the last token
    read_s: float = 30.0  # longest time for a body to arrive, and for a client to take what was sent
    drain_s: float = 30.0  # after SIGTERM, for what runs

    @property
    def reserve_bytes(self) -> int:
        """Of the budget, for what clients send and what is kept to answer them: a body of many small parts takes up to
        24 times its size while it is read, `TOGETHER` bodies wait, and the open requests share the rest."""
        return (PARSED + TOGETHER) * self.body_bytes + self.open_bytes

    @property
    def open_bytes(self) -> int:
        """For the open requests."""
        return 16 * self.body_bytes
