"""Linear maps by path, and what stands in their place: dense, packed or adapted, behind one protocol.

A linear map is an `nn.Linear`, transformers' `Conv1D` (its weight is stored [I, O]), or any module with `in_features`,
`out_features` and `dense()`, such as the packed formats. Everything here takes any `nn.Module` that holds such maps.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from satchel.core.errors import ModelError, UnknownName

# N tokens, I inputs, O outputs

OUTER = frozenset({"lm_head", "embed_out", "output_projection", "score", "classifier", "project_in", "project_out"})
OUTER |= {"embed_tokens", "wte", "embed_in"}
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


@runtime_checkable
class Map(Protocol):
    """A linear map in other clothes than `nn.Linear`'s: packed or adapted."""

    in_features: int
    out_features: int

    def dense(self) -> Tensor: ...


class Conv1D(Protocol):
    """transformers' linear map."""

    weight: Tensor  # [I, O]


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear map. Raises ModelError for any other module."""
    if isinstance(module, Map | nn.Linear):
        return module.in_features, module.out_features
    if _is_conv1d(module):
        inputs, outputs = module.weight.shape
        return inputs, outputs
    raise _no_map(module)


def dense_OI(module: nn.Module) -> Tensor:
    """The matrix of a linear map, [O, I]: a view of it where it is stored so, else made anew. Raises ModelError."""
    if isinstance(module, Map):
        return module.dense()
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if _is_conv1d(module):
        return module.weight.detach().T
    raise _no_map(module)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a map's matrix; of a packed one's, that which it is unpacked to. Raises ModelError."""
    for holder in (getattr(module, "weight", None), module):
        if isinstance(dtype := getattr(holder, "dtype", None), torch.dtype):
            return dtype
    raise _no_map(module)


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can go around the module."""
    return isinstance(module, Map | nn.Linear) or _is_conv1d(module)


def swap(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put `module` at `path` ('model.layers.0.mlp.up_proj') and return the one that was there."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, name)
    setattr(owner, name, module)
    return old


def linears(model: nn.Module, targets: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Linear maps by path, in the model's order.

    A target is a path, the end of one ('self_attn.q_proj'), or a shell pattern for either: 'layers.[0-3].*'.
    Without targets: all but those before and after the blocks, and the routers of sparse blocks.
    Raises UnknownName for a target that matches nothing.
    """
    found = dict(_walk(model, "", set()))
    if not targets:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return {path: m for path, m in found.items() if m is not head and not _outer(path)}
    for target in targets:
        if not any(_matches(path, target) for path in found):
            raise UnknownName("linear map", target, {_last(path) for path in found}, where="targets")
    return {path: m for path, m in found.items() if any(_matches(path, target) for target in targets)}


def _outer(path: str) -> bool:
    """Whether a map is a router, or stands before or behind the blocks; embeddings may have one within."""
    return _last(path) in ROUTERS or not OUTER.isdisjoint(path.split("."))


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if child in seen:
            continue
        seen.add(child)
        here = f"{path}.{name}" if path else name
        if is_linear(child):
            yield here, child
        else:
            yield from _walk(child, here, seen)


def _matches(path: str, target: str) -> bool:
    return fnmatch.fnmatchcase(path, target) or fnmatch.fnmatchcase(path, "*." + target)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _is_conv1d(module: nn.Module) -> TypeGuard[Conv1D]:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2


def _no_map(module: nn.Module) -> ModelError:
    return ModelError(f"{type(module).__name__} is no linear map; it has no dense(), in_features and out_features")
