"""Watches a run operator by operator: which bytes live when, and what the operators cost.

A `Tracker` is a dispatch mode. It works the same on fake tensors (a rehearsal) and on real ones. The run is cut into
segments by `mark(name)`; every storage is known by the segment that made it, and may be labelled afterwards with its
account and its layer, since a gradient is only known as one when the backward pass is over.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import satchel.model.tiling  # noqa: F401 - whose operators are counted
from satchel.native.levels import supported
from satchel.native.operators import BODIES, short_walks

aten = torch.ops.aten
THIN = 32  # operations a byte below which moving the byte is what takes the time
# Bytes of a thread's part at most, with tiles of AMX and without; half of a smaller matrix. Measured with oneDNN, to
# 0.6 MiB.
PACKED_TILES, PACKED = 1200 << 10, 128 << 10
ENGINE = "_engine_run_backward"  # the function of torch.autograd under which the engine runs
WRAPPERS = ("_dynamo", "_compile.py")  # files of torch that stand between an operator's caller and a dispatch mode


class Work(NamedTuple):
    """What one call of an operator does; a run is a count of these."""

    kind: str  # 'product/bfloat16', 'product/bfloat16/thin': of matrices; else the operator, 'silu/bfloat16'
    flops: int  # floating-point operations; 0 for elementwise operators and copies
    moved_bytes: int  # read and written

    @property
    def size(self) -> int:
        """What the time of such a call grows with: operations, or bytes if it does few for each."""
        return self.flops if self.flops >= THIN * self.moved_bytes else self.moved_bytes


class Label(NamedTuple):
    """Where the bytes of a storage are booked."""

    account: str
    layer: int | None  # None: of no layer


@dataclass
class Segment:
    """One stretch of the run between two marks: its storage events in order, its work."""

    name: tuple
    events: list[tuple[int, int]] = field(default_factory=list)  # storage number; +bytes at birth, -bytes at death
    work: Counter[Work] = field(default_factory=Counter)


class Tracker(TorchDispatchMode):
    """Records while active. `segments` and `labels` are what it leaves."""

    def __init__(self, *first: Any) -> None:
        """`first` names the segment that the run begins with."""
        super().__init__()
        self.segments = [Segment(first)]
        self.labels: dict[int, Label] = {}  # by storage number, for those that were labelled
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # id of a living storage -> its number
        self._count = 0
        self._sum: tuple[int, int] | None = None  # the sum that autograd has just made: number, size
        self._same: dict[int, int] = {}  # number of such a sum -> number of the storage that it would be written into
        self._bodies: dict[tuple, int] = {}  # operators of ours, as they were called -> what their bodies took

    def mark(self, *name: Any) -> None:
        """Begin the segment `name`."""
        self.segments.append(Segment(name))

    def label(self, tensors: Iterable[Tensor], account: str, layer: int | None = None) -> None:
        """Book these tensors' storages under an account and a layer, from their birth on; the first label stays."""
        for tensor in tensors:
            number = self._see(tensor)
            self.labels.setdefault(self._same.get(number, number), Label(account, layer))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._sum = None
        out = func(*args, **kwargs)
        every = (t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor) and t.device.type != "meta")
        tensors = {id(t): t for t in every}
        for tensor in tensors.values():
            self._see(tensor, nothing=func is aten._efficientzerotensor.default)
        if not func.is_view and func.namespace != "prim":
            self.segments[-1].work[work_of(func, args, kwargs, out, list(tensors.values()))] += 1
        if scratch := _scratch(func, args, out) or self._inside(func, args):
            self._count += 1
            self.segments[-1].events += [(self._count, scratch), (self._count, -scratch)]
        if func is aten.add.Tensor and _autograd_adds():
            self._sum = self._see(out), out.untyped_storage().nbytes()
        return out

    def _inside(self, func: Any, args: tuple) -> int:
        """Bytes that the body of an operator of ours takes beside fake arguments; a kernel takes none."""
        body = BODIES.get(func)
        if body is None or not isinstance(args[0], FakeTensor) or body.kernel_takes(*args):
            return 0  # of real arguments it would do its work twice
        key = (func, *(_outline(each) for each in tree_iter(args)))
        if key not in self._bodies:
            self._bodies[key] = _taken(body.run, args)
        return self._bodies[key]

    def _see(self, tensor: Tensor, nothing: bool = False) -> int:
        """The number of a tensor's storage, which takes no bytes if it is the zero tangent of what has none."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._live:
            self._count += 1
            number, size = self._count, 0 if nothing else storage.nbytes()
            self._live[key] = number, weakref.ref(storage, lambda _: self._gone(key, number, size))
            self.segments[-1].events.append((number, size))
        return self._live[key][0]

    def _gone(self, key: int, number: int, size: int) -> None:
        del self._live[key]
        number, events = self._same.get(number, number), self.segments[-1].events
        if self._sum and self._sum[1] == size and events[-1] == self._sum:
            self._same[events.pop()[0]] = number  # the sum lives on in its place
            self._sum = None
        else:
            events.append((number, -size))


def _outline(argument: Any) -> Any:
    """What an operator's temporaries depend on of an argument: no number."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.device
    return argument if isinstance(argument, str) else type(argument)


def _taken(run: Any, args: tuple) -> int:
    """The most bytes that are alive within a function of fake tensors, beside those and its result."""
    with short_walks(), Tracker() as tracker:
        tracker.label((each for each in tree_iter(args) if isinstance(each, Tensor)), "arguments")
        tracker.mark("run")
        out = run(*args)
    changes = (change for _, change in tracker.segments[-1].events)
    return max(accumulate(changes, initial=0)) - sum(t.nbytes for t in tree_iter(out) if isinstance(t, Tensor))


def _autograd_adds() -> bool:
    """Whether autograd itself, no Python of a backward function, adds up two gradients of one tensor.

    It does so in place, into one that nobody else holds, except while a dispatch mode looks on; the tracker takes the
    copy back out of its books.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame and any(part in frame.f_code.co_filename for part in WRAPPERS):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == ENGINE


def _scratch(func: Any, args: tuple, out: Any) -> int:
    """Bytes that an operator on a CPU takes for itself: no fake tensor shows them, since the library inside of torch
    allocates them."""
    if torch.Tag.pointwise in func.tags:
        return _widened(args, out)
    if func._overloadpacket not in (aten.mm, aten.addmm, aten.addmm_):
        return 0
    second = args[-1]  # each thread lays out its part of it anew, unless it is transposed
    if second.device.type != "cpu" or second.element_size() != 2 or second.stride(-1) != 1:
        return 0
    return torch.get_num_threads() * min(PACKED_TILES if supported()[0] == "amx" else PACKED, second.numel())


def _widened(args: tuple, out: Any) -> int:
    """A pointwise operator copies operands that have not the widest of their types into that, and so its result."""
    floats = [t for t in (*args, out) if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
    if len({t.dtype for t in floats}) < 2 or floats[0].device.type != "cpu":
        return 0
    widest = max(t.element_size() for t in floats)
    return sum(t.numel() * widest for t in floats if t.element_size() < widest)


def work_of(func: Any, args: tuple, kwargs: dict, out: Any, tensors: list[Tensor]) -> Work:
    """What a call does: `tensors` are those that it reads and writes, each once."""
    moved = sum(t.numel() * t.element_size() for t in tensors)
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    name, counter = func._overloadpacket.__name__, FLOPS.get(func._overloadpacket)
    # of an operator that does several things; 'INT8:768' is any INT8
    variant = [value.partition(":")[0] for value in args if isinstance(value, str)]
    if counter is None:
        return Work("/".join([name, dtype, *variant]), 0, moved)
    flops = int(counter(*args, **kwargs, out_val=out))
    product = "product" if func.namespace == "aten" and "attention" not in name else name
    thin = ["thin"] * (flops < THIN * moved)
    return Work("/".join([product, dtype, *variant, *thin]), flops, moved)


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _tiled_flops(x: Tensor, tiles: Tensor, bias_O: Tensor | None, kind: str, outputs: int, *rest: Any, **_: Any) -> int:
    return 2 * x.numel() * outputs


FLOPS = {
    **flop_registry,
    torch.ops.satchel.tiled_linear: _tiled_flops,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
