"""What both sides of bench/tune share: the tokens, the loop, and how memory and time are read.

Memory is VmHWM during the steps, reset once the model is loaded and touched, minus the resident bytes at that moment:
adapters, gradients, activations, optimizer state and whatever the libraries' kernels take on first use. The held-out
loss is taken after that.

Shapes: M blocks, C = context + 1 tokens of a block: the last one is only a target.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from satchel.run.memory import peak_resident_bytes, reset_peak_resident, resident_bytes

BATCH, CONTEXT, HELD_OUT = 4, 256, 16  # rows of a step, tokens of a row, rows that are held out
CLIP = 1.0  # gradient norm


@dataclass(frozen=True)
class Tokens:
    """The same tokens for everybody."""

    train_MC: np.ndarray  # int32
    held_out_MC: np.ndarray  # int32
    order_SB: np.ndarray  # int64: the blocks that each step sees

    def write(self, path: Path) -> None:
        """Keep as .npz."""
        np.savez(path, train_MC=self.train_MC, held_out_MC=self.held_out_MC, order_SB=self.order_SB)

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """What `write` kept."""
        with np.load(path) as found:
            return cls(found["train_MC"], found["held_out_MC"], found["order_SB"])


@dataclass(frozen=True)
class Tuning:
    """A model that is ready to train."""

    step: Callable[[int], float]  # one optimizer step of that number; the loss before it
    evaluate: Callable[[], float]  # the held-out loss
    optimizer: Any  # a torch optimizer, for its state


@dataclass(frozen=True)
class Allocator:
    """What a side can say of, and do to, the allocator of its tensors."""

    trim: Callable[[], None] = lambda: None  # give its free pages back, and count its peak from now on
    peak: Callable[[], int] = lambda: 0  # bytes of tensors; 0: not known


UNKNOWN = Allocator()


def run(model: nn.Module, prepare: Callable[[], Tuning], steps: int, allocator: Allocator = UNKNOWN) -> dict[str, Any]:
    """Train a loaded model and measure."""
    touch(model)
    model_bytes = sum(t.untyped_storage().nbytes() for t in distinct(model.state_dict().values()))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    allocator.trim()
    reset_peak_resident()
    before = resident_bytes()
    tuning = prepare()
    walls, cpus, losses = [], [], []
    for number in range(steps):
        wall, cpu = time.perf_counter(), cpu_seconds()
        losses.append(tuning.step(number))
        walls.append(time.perf_counter() - wall)
        cpus.append(cpu_seconds() - cpu)
    peak, tensors = peak_resident_bytes(), allocator.peak()
    return {
        "model_bytes": model_bytes,
        "above_model_bytes": peak - before,
        "peak_bytes": peak,
        "tensor_bytes": tensors,
        "state_bytes": state_bytes(tuning.optimizer),
        "first_wall_s": walls[0],
        "first_cpu_s": cpus[0],
        "wall_s": middle(walls[1:] or walls),
        "cpu_s": middle(cpus[1:] or cpus),
        "losses": losses,
        "held_out": tuning.evaluate(),
    }


def cpu_seconds() -> float:
    """CPU time of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def touch(model: nn.Module) -> None:
    """Read every weight once: pages of a mapped file are resident only then."""
    for tensor in distinct(model.state_dict().values()):
        tensor.view(-1)[:: 4096 // tensor.element_size()].sum()


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor for each storage."""
    return list({t.untyped_storage().data_ptr(): t for t in tensors}.values())


def state_bytes(optimizer: Any) -> int:
    """Bytes of all tensors in an optimizer's state, also of those in objects of its own, such as projectors."""
    return sum(t.untyped_storage().nbytes() for t in distinct(_tensors(list(optimizer.state.values()))))


def middle(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))
