"""Add what adapters learned to the matrices they stand around, after showing that nothing is lost.

    W' = W + sum of deltas, summed in float32, rounded once to W's dtype

All maps are checked before the first is changed, one dense matrix at a time. A packed base becomes an `nn.Linear` in
the dtype that it had before it was packed (bfloat16 in the house): rounding W' to few bits again would lose the tuning.
On fake tensors every check holds: that is how the memory of a merge is rehearsed.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from satchel.core.errors import ModelError, UserError
from satchel.model.adapters import Adapted, adapted
from satchel.model.linear import dense_OI, dtype_of, swap

# N tokens, I inputs, O outputs

PROBES = 8  # random inputs that the merged and the unmerged map are compared on
SUMS = 1e-5  # relative error of float32 sums over a row


@dataclass(frozen=True)
class Merged:
    """One map that was merged."""

    path: str
    kept: float  # share of the change that W's dtype holds; near 1, less where the change is below its rounding step


def merge(model: nn.Module) -> list[Merged]:
    """Put W' in place of every adapted map, and let train again what trained before the adapters came.

    Raises ModelError, before anything is changed, with the names of the maps whose change is zero (but for experts
    that were never routed to), not finite, lost in rounding, or not what the adapter computes; whose matrix is shared;
    or whose adapter cannot be merged.
    """
    places = dict(adapted(model))
    if not places:
        raise UserError("nothing to merge: the model has no adapter; attach or load one first")
    _refuse_shared(model, places)
    shares = {path: _verify(path, place) for path, place in places.items()}
    _refuse_idle([path for path, kept in shares.items() if kept is None], len(places))
    for path, place in places.items():
        swap(model, path, _merged(path, place))
    for parameter in (p for place in places.values() for p in place.frozen):
        parameter.requires_grad_(True)
    return [Merged(path, 1.0 if kept is None else kept) for path, kept in shares.items()]


@torch.no_grad()
def _merged(path: str, place: Adapted) -> nn.Module:
    exact_OI = dense_OI(place.base).float() + _change(path, place)
    if isinstance(getattr(place.base, "weight", None), nn.Parameter):
        dense_OI(place.base).copy_(exact_OI)
        return place.base
    return _linear(place, exact_OI.to(dtype_of(place.base))).train(place.training)


@torch.no_grad()
def _verify(path: str, place: Adapted) -> float | None:
    """The share of the change that survives rounding; None if there is no change."""
    weight_OI, change_OI = dense_OI(place.base), _change(path, place)
    exact_OI = weight_OI + change_OI
    if not holds(exact_OI.isfinite().all()):
        raise ModelError(f"{path}: the merged matrix is not finite; the training diverged, take an earlier checkpoint")
    rounded_OI = exact_OI.to(weight_OI.dtype)
    _require_same(path, place, exact_OI, rounded_OI)
    if not holds(change_OI.any()):
        return None
    survived_OI = exact_OI.copy_(rounded_OI).sub_(weight_OI)
    if not holds(survived_OI.any()):
        dtype = str(weight_OI.dtype).removeprefix("torch.")
        raise ModelError(
            f"{path}: the change is below {dtype}'s rounding step; load the model in float32 and merge that"
        )
    kept = survived_OI.flatten().dot(change_OI.flatten()) / change_OI.square_().sum()
    return 1.0 if isinstance(kept, FakeTensor) else float(kept)


def _change(path: str, place: Adapted) -> Tensor:
    """The sum of the adapters' deltas, [O, I] in float32."""
    change_OI = torch.zeros((), device=dense_OI(place.base).device)
    for name, method in place.methods.items():
        delta_OI = method.delta(place.adapters[name], place.base)
        if delta_OI is None:
            raise ModelError(f"{path}: {method.name} cannot be merged; save the adapter by itself")
        change_OI = delta_OI.add_(change_OI)
    return change_OI


def _require_same(path: str, place: Adapted, exact_OI: Tensor, rounded_OI: Tensor) -> None:
    """In float32, where every error of the formula shows, and in the model's own dtype, as it will run."""
    training = place.training
    place.eval()  # no dropout
    own_OI = dense_OI(place.base)  # not the base itself: a packed one may round its inputs
    for base_OI, weight_OI, bound in (
        (own_OI.float(), exact_OI, SUMS),
        (own_OI, rounded_OI, max(SUMS, 2 * torch.finfo(rounded_OI.dtype).eps)),
    ):
        rng = torch.Generator().manual_seed(0)
        x_NI = torch.randn(PROBES, place.in_features, generator=rng).to(weight_OI)
        unmerged_NO = place.run(x_NI, _linear(place, base_OI)).float()
        merged_NO = _linear(place, weight_OI)(x_NI).float()
        gap = (unmerged_NO - merged_NO).norm() / unmerged_NO.norm().clamp_min(1e-30)
        if not holds(gap <= bound):
            raise ModelError(
                f"{path}: the merged map differs from the unmerged one by {float(gap):.1e}, more than "
                f"rounding's {bound:.1e}; nothing was changed, save the adapter by itself"
            )
    place.train(training)


def holds(flag: Tensor) -> bool:
    """Whether a check passed; on fake tensors every check does."""
    return isinstance(flag, FakeTensor) or bool(flag)


def _linear(place: Adapted, weight_OI: Tensor) -> nn.Linear:
    linear = nn.Linear(place.in_features, place.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    bias_O = getattr(place.base, "bias", None)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.detach().to(weight_OI.dtype), requires_grad=False)
    return linear


def _refuse_idle(idle: list[str], maps: int) -> None:
    silent = idle if len(idle) == maps else [path for path in idle if "experts" not in path.split(".")]
    if silent:
        raise ModelError(
            f"merging would change nothing at {_listed(silent)}: the adapter is zero there; "
            "train it first, or detach it"
        )


def _refuse_shared(model: nn.Module, places: dict[str, Adapted]) -> None:
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = [path for path, m in places.items() if uses[id(getattr(m.base, "weight", None))] > 1]
    if shared:
        raise ModelError(f"{_listed(shared)}: the matrix is used elsewhere in the model too; untie it before merging")


def _listed(paths: list[str], shown: int = 5) -> str:
    return ", ".join(paths[:shown]) + (f" and {len(paths) - shown} more" if len(paths) > shown else "")
