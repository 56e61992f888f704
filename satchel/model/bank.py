"""Many low-rank adapters on one model at once: each run of tokens in a row has its own, of its own rank.

    y[run] += scale * (x[run] A^T) B^T          for every linear map that the run's adapter changes

The matrices lie in blocks of the pool that also holds keys and values, those of one adapter in contiguous ones, A as
[R, I] and B transposed as [R, O]. On a CPU native/low_rank.cpp adds all runs in one call a map; elsewhere, and without
a compiler, torch does run by run.
Paper: https://arxiv.org/abs/2311.03285
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from satchel.core.errors import ModelError
from satchel.model.linear import dense_OI, features, linears, swap
from satchel.native import low_rank as native

# N tokens of a row, I inputs, O outputs, R rank, S runs, P adapted maps of the model


@dataclass(frozen=True)
class LowRank:
    """The update of one map."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float


@dataclass(frozen=True)
class Stored:
    """Where an adapter's matrices lie in the pool, in elements from its beginning, by number of the map."""

    down_P: Tensor  # int64
    up_P: Tensor
    rank_P: Tensor  # 0: the adapter leaves the map alone
    scale_P: Tensor  # float32


@dataclass(frozen=True)
class Span:
    """Tokens [first, stop) of a row, and the adapter on them."""

    first: int
    stop: int
    stored: Stored


class Bank:
    """Puts itself around a model's linear maps; what it adds to them is said by `using`."""

    def __init__(self, model: nn.Module, data: Tensor) -> None:
        """`data` is the pool's tensor, contiguous, of the dtype that the model computes in."""
        self.flat = data.view(-1)
        maps = {path: m for path, m in linears(model).items() if "experts" not in path.split(".")}
        self.shapes = {path: features(m) for path, m in maps.items()}
        for number, (path, module) in enumerate(maps.items()):
            swap(model, path, Banked(module, self, number))
        self._table: tuple[Tensor, ...] | None = None

    def numbers(self, adapter: Mapping[str, LowRank]) -> int:
        """Elements that an adapter takes. Raises ModelError for a map that cannot be adapted here."""
        if homeless := sorted(adapter.keys() - self.shapes.keys()):
            raise ModelError(f"{homeless[0]}: an adapter of this map cannot be served beside others; merge it")
        return sum(low.A_RI.numel() + low.B_OR.numel() for low in adapter.values())

    def store(self, adapter: Iterable[tuple[str, LowRank]], start: int) -> Stored:
        """Write an adapter into the pool, from element `start` on, map by map as they come."""
        table = torch.zeros(3, len(self.shapes), dtype=torch.int64)
        scale_P = torch.zeros(len(self.shapes))
        numbers = {path: number for number, path in enumerate(self.shapes)}
        for path, low in adapter:
            number = numbers[path]
            middle = start + low.A_RI.numel()
            stop = middle + low.B_OR.numel()
            self.flat[start:middle].view(low.A_RI.shape).copy_(low.A_RI)
            self.flat[middle:stop].view(low.B_OR.shape[::-1]).copy_(low.B_OR.T)
            table[:, number] = torch.tensor([start, middle, len(low.A_RI)])
            scale_P[number], start = low.scale, stop
        down_P, up_P, rank_P = table
        return Stored(down_P, up_P, rank_P, scale_P)

    @contextmanager
    def using(self, spans: Sequence[Span]) -> Iterator[None]:
        """The adapters of the rows that the model is called with inside."""
        self._table = self._gather(spans) if spans else None
        try:
            yield
        finally:
            self._table = None

    @property
    def idle(self) -> bool:
        """Whether no row has an adapter now."""
        return self._table is None

    def add(self, number: int, x_NI: Tensor, y_NO: Tensor) -> None:
        """Add what the runs' adapters say of map `number` to its output, in place."""
        if self._table is not None:
            first_S, stop_S, *rest = self._table
            add_low_rank(y_NO, x_NI, self.flat, first_S, stop_S, *(t_PS[number] for t_PS in rest))

    @staticmethod
    def _gather(spans: Sequence[Span]) -> tuple[Tensor, ...]:
        bounds_2S = torch.tensor([[span.first, span.stop] for span in spans]).T.contiguous()
        fields = ("down_P", "up_P", "rank_P", "scale_P")
        return *bounds_2S, *(torch.stack([getattr(span.stored, f) for span in spans], 1) for f in fields)


class Banked(nn.Module):
    """A linear map to whose output a bank adds."""

    def __init__(self, base: nn.Module, bank: Bank, number: int) -> None:
        super().__init__()
        self.base, self.number = base, number
        self.in_features, self.out_features = features(base)
        self._bank = (bank,)  # no submodule, and no part of the state

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        y = self.base(x)
        self._bank[0].add(self.number, x.flatten(0, -2), y.flatten(0, -2))
        return y

    @property
    def idle(self) -> bool:
        """Whether the bank adds nothing now."""
        return self._bank[0].idle

    def dense(self) -> Tensor:
        """The base's matrix, without adapters."""
        return dense_OI(self.base)


def add_low_rank(
    y_NO: Tensor,
    x_NI: Tensor,
    flat: Tensor,
    first_S: Tensor,
    stop_S: Tensor,
    down_S: Tensor,
    up_S: Tensor,
    rank_S: Tensor,
    scale_S: Tensor,
) -> None:
    """Adds to each run of rows its update, in place: y_NO += scale * (x_NI down^T) up."""
    kernel = native.library() if _suits(y_NO, x_NI, flat) else None
    if kernel is None:
        add_in_torch(y_NO, x_NI, flat, first_S, stop_S, down_S, up_S, rank_S, scale_S)
        return
    tensors = {"x": x_NI, "y": y_NO, "weights": flat, "down": down_S, "up": up_S, "rank": rank_S}
    tensors |= {"first": first_S, "stop": stop_S, "scale": scale_S}
    batch = native.Batch(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        x_row=x_NI.stride(0),
        y_row=y_NO.stride(0),
        runs=len(first_S),
        inputs=x_NI.shape[1],
        outputs=y_NO.shape[1],
    )
    native.add(kernel, batch, flat.dtype)


def _suits(*tensors: Tensor) -> bool:
    narrow = tensors[0].dtype in (torch.float32, torch.bfloat16) and len({t.dtype for t in tensors}) == 1
    return narrow and all(t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)


def add_in_torch(
    y_NO: Tensor,
    x_NI: Tensor,
    flat: Tensor,
    first_S: Tensor,
    stop_S: Tensor,
    down_S: Tensor,
    up_S: Tensor,
    rank_S: Tensor,
    scale_S: Tensor,
) -> None:
    """What the kernel does, run by run."""
    inputs, outputs = x_NI.shape[1], y_NO.shape[1]
    offsets = (first_S, stop_S, down_S, up_S, rank_S, scale_S)
    for first, stop, down, up, rank, scale in zip(*(t.tolist() for t in offsets), strict=True):
        if rank:
            A_RI = flat[down : down + rank * inputs].view(rank, inputs)
            B_RO = flat[up : up + rank * outputs].view(rank, outputs)
            y_NO[first:stop].addmm_(x_NI[first:stop] @ A_RI.T, B_RO, alpha=scale)
