"""How an update lands in a parameter, for every optimizer: the knobs that say so, and the arithmetic of one slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from satchel.core.seams import OptimizerMethod
from satchel.optim._shared import ROUNDINGS, STORES, land_, land_master_, noises

# N elements of a slice


@dataclass(frozen=True, kw_only=True)
class Landing(OptimizerMethod):
    """What every optimizer lets one choose about its update, whatever its formula."""

    weight_decay: float = 0.0  # share of a matrix that a step at lr=1 takes away, [0, 1]
    rounding: Literal["stochastic", "fp32", "nearest"] = "stochastic"  # how an update lands in bf16

    def __post_init__(self) -> None:
        self.require(0 <= self.weight_decay <= 1, f"weight_decay={self.weight_decay} is outside [0, 1]; try 0.01")
        self.require(self.rounding in ROUNDINGS, f"no rounding '{self.rounding}'; there is {', '.join(ROUNDINGS)}")


def keep(group: dict[str, Any]) -> float:
    """The share of a parameter that weight decay leaves."""
    return 1 - group["lr"] * group["weight_decay"]


def low_bits(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state that exact rounding takes: the low half of the float32 master, zero at the start."""
    if group["rounding"] != "fp32" or p.dtype == torch.float32:
        return {}
    return {"low": torch.zeros(p.numel(), dtype=torch.int16, device=p.device)}


def put_(x: Tensor, low: Tensor | None, wide: Tensor, rounding: str, seed: int, cut: slice) -> None:
    """Write float32 values, which are used up, into the slice `cut` of a parameter as `rounding` says."""
    noisy = rounding == "stochastic" and x.dtype != torch.float32
    land_master_(x, low, wide, noises(seed, cut, x.device)[0].view_as(x) if noisy else None)


def keep_average_(store: str, held: Sequence[Tensor], cut: slice, wide_N: Tensor, seed: int) -> None:
    """Put a slice of a slowly moving average back, in bfloat16 with stochastic rounding, whatever its sign."""
    if store == "bf16":
        land_(held[0][cut], wide_N, noises(seed, cut, wide_N.device)[1])
    else:
        STORES[store].write_(held, cut, wide_N, True, None)
