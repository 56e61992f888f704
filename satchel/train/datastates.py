"""Copy a checkpoint's tensors aside while the next step computes, and write them to the disk behind the copies.

    save     hands the tensors over and returns: they change only in the next update
    copy     during the next forward and backward pass a thread copies them into one ring buffer, largest first
    flush    another sums up and writes each piece as soon as it is there, and frees its room; at the end it commits
    update   waits for the copies alone: for the disk only as far as what is still to be copied exceeds the ring

The files are those of `blocking`, byte for byte. Saves the time that the loop waits; spends `ring_mib` of memory, with
a GPU pinned memory of its host. If a checkpoint is not on the disk when the next one is due, the loop waits for it: the
disk is then slower than the steps, whatever the ring.

Copying, summing and writing a gigabyte takes a core half a second. On Linux the threads that do it take what the step
leaves idle: `nice` says how far they stand back. Where other programs take all cores they then wait for those, too, and
the update for them; there nice=0 is quicker.
Paper: https://arxiv.org/abs/2406.10707
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from satchel.core.errors import JobError
from satchel.core.seams import Card, Checkpoint, Saver, Write
from satchel.train._ring import Ring, Stopped


@dataclass(frozen=True, kw_only=True)
class DataStates(Checkpoint):
    """The loop goes on while the checkpoint is written."""

    card = Card(
        paper="https://arxiv.org/abs/2406.10707",
        saves=("stall",),
        spends=("workspace",),
        fidelity="exact",
        claim="up to 48 times faster checkpoints and 2.2 times faster training on up to 180 GPUs",
        reference="safetensors",
    )

    ring_mib: int = 32  # MiB of the buffer between tensors and disk, [1, inf)
    nice: int = 10  # how far its threads' priority lies below the step's, [0, 19]

    def __post_init__(self) -> None:
        self.require(0 <= self.nice <= 19, f"nice={self.nice} is outside [0, 19]; 10 leaves the step nearly all")
        self.require(self.ring_mib >= 1, f"ring_mib={self.ring_mib} is below 1; 32 keeps a disk busy")

    def start(self, device: torch.device) -> Stager:
        """A saver whose ring is allocated at once, but for the pinned one of a GPU."""
        return Stager(self.ring_mib << 20, device, self.nice)


class Stager(Saver):
    """At most one checkpoint is on its way at a time."""

    def __init__(self, ring_bytes: int, device: torch.device, nice: int = 0) -> None:
        self._bytes, self._device, self._nice = ring_bytes, device, nice
        self._buffer_U = self._allocate() if device.type == "cpu" else None
        self._flight: Flight | None = None

    def save(self, files: Mapping[str, Mapping[str, Tensor]], write: Write) -> None:
        """See `Saver`."""
        self._land()
        if self._buffer_U is None:
            self._buffer_U = self._allocate()
        self._flight = Flight(Ring(self._buffer_U), files, write, self._device, self._nice)

    def settle(self) -> None:
        """See `Saver`."""
        if self._flight:
            self._flight.copied.wait()
            self._tell(self._flight)

    def buffers(self) -> list[Tensor]:
        """The ring, unless it lies beside a GPU."""
        return [t for t in [self._buffer_U] if t is not None and t.device.type == self._device.type]

    def finish(self) -> None:
        """See `Saver`."""
        self._land()
        self._buffer_U = None

    def _land(self) -> None:
        if flight := self._flight:
            flight.join()
            self._tell(flight)
            self._flight = None

    def _tell(self, flight: Flight) -> None:
        """Raise what a thread met, once."""
        if flight.error:
            flight.join()
            self._flight = None
            raise flight.error

    def _allocate(self) -> Tensor:
        return torch.empty(self._bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


class Flight:
    """One checkpoint on its way: a thread that copies its tensors into the ring, and one that writes what is there."""

    def __init__(
        self, ring: Ring, files: Mapping[str, Mapping[str, Tensor]], write: Write, device: torch.device, nice: int
    ) -> None:
        self.copied = threading.Event()  # no tensor is read any more
        self.error: BaseException | None = None  # that ended it, the first one
        self._ring = ring
        tensors = [(name, t.detach(), t._version) for named in files.values() for name, t in named.items()]
        streams = {name: ring.take(sum(t.nbytes for t in named.values())) for name, named in files.items()}
        side = _side_stream(device)
        works = (lambda: self._copy(tensors, side)), (lambda: write(streams))
        self._threads = [threading.Thread(target=self._run, args=(work, nice), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until both threads have ended."""
        for thread in self._threads:
            thread.join()

    def _run(self, work: Callable[[], None], nice: int) -> None:
        try:
            _stand_back(nice)
            work()
        except Stopped:
            pass  # the other thread has said why
        except BaseException as error:
            self.error = error
            self._ring.stop()

    def _copy(self, tensors: list[tuple[str, Tensor, int]], side: AbstractContextManager[object]) -> None:
        try:
            with side:
                for name, tensor, version in tensors:
                    self._ring.put(tensor, partial(_require, name, tensor, version))
        finally:
            self.copied.set()


def _stand_back(nice: int) -> None:
    """Lower the priority of the calling thread, where a thread has one of its own and may."""
    if sys.platform == "linux":
        with suppress(OSError):
            lower = min(os.getpriority(os.PRIO_PROCESS, 0) + nice, 19)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), lower)


def _require(name: str, tensor: Tensor, version: int) -> None:
    """Raises JobError if a tensor was written to since it had this version."""
    if tensor._version != version:
        raise JobError(
            f"'{name}' was written to while it was being saved, so that checkpoint is dropped: the optimizer's step "
            "has to run its hooks before it writes; resume with checkpoint=blocking"
        )


def _side_stream(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU a stream beside the step's, behind all that was asked of the GPU so far."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
