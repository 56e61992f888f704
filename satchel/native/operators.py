"""Operators of our own, and what they allocate beside their arguments and results.

A rehearsal sees an operator as one operation, which its fake tensors do not enter: what a body in torch takes, slice by
slice, would be missed, on a device some hundred megabytes. So it is kept here, for a rehearsal to look into.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

_SHORT: ContextVar[bool] = ContextVar("short", default=False)


class Body(NamedTuple):
    """What an operator allocates beside its arguments and result: what `run` of the same arguments does; nothing where
    a kernel takes them."""

    run: Callable[..., Any]
    kernel_takes: Callable[..., bool] = lambda *_: False


BODIES: dict[torch._ops.OpOverload, Body] = {}


def operator(
    schema: str,
    body: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
    takes: Callable[..., bool] = lambda *_: False,
    fake: Callable[..., Any] = lambda *_: None,
) -> torch._ops.OpOverload:
    """Define `satchel::name` by its schema, "name(Tensor(a!) x_N, ...) -> ()".

    On a CPU `kernel` runs in the body's place where it `takes` the arguments; `fake` makes the result, if there is one.
    """
    name = schema.partition("(")[0]
    torch.library.define(f"satchel::{name}", schema.removeprefix(name))
    torch.library.impl(f"satchel::{name}", "default", body)
    if kernel is not None:
        torch.library.impl(f"satchel::{name}", "CPU", lambda *given: (kernel if takes(*given) else body)(*given))
    torch.library.register_fake(f"satchel::{name}", fake)
    defined = getattr(torch.ops.satchel, name).default
    BODIES[defined] = Body(body, takes)
    return defined


def allocates(defined: torch._ops.OpOverload, run: Callable[..., None]) -> None:
    """Say what the kernel of an operator that is defined elsewhere takes for itself: as much as `run` does."""
    BODIES[defined] = Body(run)


@contextmanager
def short_walks() -> Iterator[None]:
    """A body takes two steps of every walk here, which is as many as are alive together."""
    token = _SHORT.set(True)
    try:
        yield
    finally:
        _SHORT.reset(token)


def walk(starts: range) -> range:
    """Where the slices begin that a body works on, one after the other."""
    return starts[:2] if _SHORT.get() else starts
