"""Which map of a model is which in its family's Hugging Face checkpoint, and adapters carried from one to the other.

A model of this house is saved under its family's own names, any other model under those that it has. Where the
checkpoint fuses maps that are apart here (Phi-3's qkv_proj, GPT-2's c_attn), it has one adapter on the fused map.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from satchel.adapt.lora import Lora
from satchel.core.errors import ModelError, UserError
from satchel.model.config import ModelConfig
from satchel.model.linear import features, linears
from satchel.model.names import hf_recipes, house_recipes

# I inputs, O outputs, R rank


@dataclass(frozen=True)
class Low:
    """The adapter of one map: its method, and tensors in float32 on their way from or to a file."""

    method: Lora
    A_RI: Tensor
    B_OR: Tensor
    m_O: Tensor | None


def their_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Each map's path in the family's checkpoint, to ours that it holds."""
    maps, config = linears(model, ("*",)), _config(model)
    if config is None:
        return {path: (path,) for path in maps}
    recipes = hf_recipes(config, [f"{path}.weight" for path in maps])
    return {_stem(hf): tuple(map(_stem, recipe.sources)) for hf, recipe in recipes.items()}


def _config(model: nn.Module) -> ModelConfig | None:
    """None: not a model of this house."""
    config = getattr(model, "config", None)
    return config if isinstance(config, ModelConfig) else None


def _stem(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _rows(model: nn.Module, theirs: str, parts: Iterable[str]) -> list[Tensor]:
    """For each of our maps, which rows of the fused one are its own. A bias is split as rows are, in every layout."""
    parts = tuple(parts)
    total = sum(features(model.get_submodule(path))[1] for path in parts)
    config = _config(model)
    if config is None or len(parts) == 1:
        return [torch.arange(total)]
    recipes = house_recipes(config, [f"{theirs}.bias"])
    return [recipes[f"{path}.bias"].make([torch.arange(total)]) for path in parts]


def fuse(model: nn.Module, ours: Mapping[str, Low]) -> dict[str, Low]:
    """Adapters by our paths to adapters by the checkpoint's."""
    fused, paths, config = {}, their_paths(model), _config(model)
    if config and (homeless := sorted(ours.keys() - {path for parts in paths.values() for path in parts})):
        raise UserError(f"{homeless[0]}: a {config.family} checkpoint has no such map of its own; merge it instead")
    for theirs, parts in paths.items():
        held = [path for path in parts if path in ours]
        if held:
            fused[theirs] = ours[parts[0]] if len(parts) == 1 else _fuse_map(model, theirs, parts, ours)
    return fused


def _fuse_map(model: nn.Module, theirs: str, parts: tuple[str, ...], ours: Mapping[str, Low]) -> Low:
    rows = dict(zip(parts, _rows(model, theirs, parts), strict=True))
    held = {path: ours[path] for path in parts if path in ours}
    first = next(iter(held.values()))
    if first.m_O is not None and len(held) < len(parts):
        raise UserError(f"{theirs}: PEFT needs dora on all of {', '.join(parts)}, which lie in one matrix there")
    shared = all(torch.equal(low.A_RI, first.A_RI) for low in held.values())
    A_RI = first.A_RI if shared else torch.cat([low.A_RI for low in held.values()])
    B_OR = torch.zeros(sum(map(len, rows.values())), len(A_RI))
    m_O = None if first.m_O is None else torch.empty(len(B_OR))
    start = 0
    for path, low in held.items():
        rank = len(low.A_RI)
        B_OR[rows[path], start : start + rank] = low.B_OR.cpu() * (low.method.scale / first.method.scale)
        start += 0 if shared else rank
        if m_O is not None and low.m_O is not None:
            m_O[rows[path]] = low.m_O.cpu()
    return Low(_strong(first.method, len(A_RI)), A_RI, B_OR, m_O)


def _strong(method: Lora, rank: int) -> Lora:
    """The method at another rank and the same scale."""
    changed = replace(method, rank=rank)
    return replace(changed, alpha=changed.alpha * method.scale / changed.scale)


def split(model: nn.Module, theirs: str, parts: tuple[str, ...], low: Low) -> dict[str, Low]:
    """The adapter of the checkpoint's map `theirs`, for each of ours that it holds. Raises ModelError for one of
    another model."""
    rows = _rows(model, theirs, parts)
    inputs, outputs = features(model.get_submodule(parts[0]))[0], sum(map(len, rows))
    if (len(low.B_OR), low.A_RI.shape[1]) != (outputs, inputs):
        raise ModelError(
            f"the adapter is for another model: {theirs} is [{len(low.B_OR)}, {low.A_RI.shape[1]}] there "
            f"and [{outputs}, {inputs}] here"
        )
    if len(parts) == 1:
        return {parts[0]: low}
    return {
        path: replace(low, B_OR=low.B_OR[own], m_O=None if low.m_O is None else low.m_O[own])
        for path, own in zip(parts, rows, strict=True)
    }
