"""The serve job: which model answers, inside which memory, and how its requests are ordered and its tokens found.

The comment behind each field is its help text, wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from satchel.core.job import Bound, Job

TOGETHER = 8  # bodies of the largest size that may be held at once
PARSED = 24  # times its size that a body may take while it is read
METHOD_FIELDS = ("format", "admission", "preemption", "decoding", "skip", "kv")  # each named after its slot


@dataclass(frozen=True, kw_only=True)
class ServeJob(Job):
    """Everything that an engine depends on."""

    slots: ClassVar[tuple[str, ...]] = METHOD_FIELDS

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

    def bounds(self) -> Iterator[Bound]:
        """See `Job`."""
        yield from super().bounds()
        yield "context", self.context == 0 or self.context >= 2, "a prompt and its answer have at least 2 tokens"
        yield "batch", self.batch >= 1, "at least 1 answer grows"
        enough = self.step_tokens >= self.batch
        yield "step_tokens", enough, f"each of batch={self.batch} answers gets a token a step"


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
