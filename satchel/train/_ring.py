"""A ring buffer between two threads: one copies tensors into it, the other takes their bytes out, in the same order.

Whoever finds the ring full, or empty, sleeps until the other has moved on. Bytes are copied without torch's own
threads: those would take the cores from the step that computes meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from satchel.model.stored import pieces

# U bytes, in uint8

PIECE = 1 << 20  # bytes: what is hashed is still in a core's cache when it is written


class Stopped(Exception):
    """The thread at the other end has given up."""


class Ring:
    """One stream of bytes through a buffer that is used again and again."""

    def __init__(self, buffer_U: Tensor) -> None:
        self.buffer_U = buffer_U
        self._most = max(1, min(PIECE, buffer_U.numel() // 4))  # bytes at once, so that both ends work at the same time
        self._put = self._taken = 0  # bytes since the beginning
        self._stopped = False
        self._moved = threading.Condition()

    def put(self, tensor: Tensor, check: Callable[[], None] = lambda: None) -> None:
        """Copy a tensor into the ring, row by row; what was copied is given on after `check`. Raises Stopped."""
        for piece in [tensor] if tensor.is_contiguous() else (part for part, _ in pieces(tensor, 0)):
            rest_U = piece.contiguous().view(-1).view(torch.uint8)
            while len(rest_U):
                at, count = self._wait_for(self._free)
                count = min(count, self._most, len(rest_U))
                _copy(self.buffer_U[at : at + count], rest_U[:count])
                rest_U = rest_U[count:]
                check()
                with self._moved:
                    self._put += count
                    self._moved.notify_all()

    def take(self, nbytes: int) -> Iterator[memoryview]:
        """The next bytes of the stream, in pieces; each is valid until the next is asked for. Raises Stopped."""
        while nbytes:
            at, count = self._wait_for(self._ready)
            count = min(count, self._most, nbytes)
            yield self.buffer_U[at : at + count].numpy().data
            nbytes -= count
            with self._moved:
                self._taken += count
                self._moved.notify_all()

    def stop(self) -> None:
        """Make whoever waits, or comes to wait, give up."""
        with self._moved:
            self._stopped = True
            self._moved.notify_all()

    def _wait_for(self, some: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """Sleep until there are some bytes; where they begin, and how many lie in a row."""
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or some()[1])
            if self._stopped:
                raise Stopped
            return some()

    def _free(self) -> tuple[int, int]:
        return self._row(self._put, self.buffer_U.numel() - (self._put - self._taken))

    def _ready(self) -> tuple[int, int]:
        return self._row(self._taken, self._put - self._taken)

    def _row(self, position: int, count: int) -> tuple[int, int]:
        at = position % self.buffer_U.numel()
        return at, min(count, self.buffer_U.numel() - at)


def _copy(to_U: Tensor, source_U: Tensor) -> None:
    if source_U.device.type == "cpu":
        np.copyto(to_U.numpy(), source_U.numpy())  # torch would wake its threads
    else:
        to_U.copy_(source_U)
