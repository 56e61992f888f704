"""Adapters in PEFT's layout: what is saved here loads there with the same logits, and the other way round.

Where a checkpoint fuses maps that are apart here, loading gives each of ours the same A and its own rows of B. Saving
stacks the A's and puts the B's on a diagonal, exactly, at the sum of their ranks; A's that are equal are shared again.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from satchel.adapt._peft_config import CONFIG, WEIGHTS, PeftConfig, config_of, read_config
from satchel.adapt._peft_names import Low, fuse, split, their_paths
from satchel.adapt.dora import Dora
from satchel.adapt.lora import Lora
from satchel.core.disk import writing
from satchel.core.errors import ModelError, UserError
from satchel.core.seams import Adapter
from satchel.model.adapters import adapted, install
from satchel.model.disk import write_text
from satchel.model.safetensors_io import Outgoing, read_safetensors, write_safetensors
from satchel.model.stored import Part, Reader

KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.weight)?")
SPELLED = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude_vector": "lora_magnitude_vector"}


def save_peft(model: nn.Module, folder: str | Path, base_name: str = "", name: str = "default") -> None:
    """Write the adapter `name` of `model` for PEFT; a folder that holds a configuration holds all the rest.

    `base_name` is the folder or hub id of the model that was tuned. Raises UserError if there is no such adapter or
    PEFT has no layout for it, NoDisk if it cannot be written.
    """
    places = {path: place for path, place in adapted(model) if name in place.adapters}
    ours = {path: _low(path, place.methods[name], place.adapters[name]) for path, place in places.items()}
    if not ours:
        raise UserError(f"nothing to save: the model has no adapter '{name}'")
    if len({isinstance(low.method, Dora) for low in ours.values()}) > 1:
        raise UserError(f"adapter '{name}' is dora on some maps only, which PEFT cannot hold in one folder; merge it")
    theirs = fuse(model, ours)
    config = config_of({path: low.method for path, low in theirs.items()}, their_paths(model).keys(), base_name)
    _write(Path(folder), config, {key: t for path, low in theirs.items() for key, t in _spell(path, low).items()})


def load_peft(
    model: nn.Module, folder: str | Path, name: str = "default", dtype: torch.dtype = torch.float32
) -> list[str]:
    """Attach the adapter that PEFT or `save_peft` wrote; the paths of its maps are returned.

    Raises ModelError, before the model is touched, if the folder is incomplete, asks for what is not supported, or
    was made for another model.
    """
    ours = read_peft(model, folder)
    install(model, {path: low.method for path, low in ours.items()}, torch.Generator(), dtype=dtype, name=name)
    with torch.no_grad():
        for path, low in ours.items():
            for parameter, tensor in _tensors(model.get_submodule(f"{path}.adapters.{name}"), low):
                parameter.copy_(tensor)
    return list(ours)


def read_peft(model: nn.Module, folder: str | Path) -> dict[str, Low]:
    """The adapter in a folder, for each of the model's maps that it changes. Raises ModelError as `load_peft` does."""
    return dict(each_peft(model, folder))


class _Outline(NamedTuple):
    """An adapter by the headers of its files: tensors on `meta`."""

    file: Path
    theirs: dict[str, tuple[tuple[str, ...], Low]]  # by the checkpoint's paths, with ours that each holds
    ours: dict[str, Low]


def each_peft(model: nn.Module, folder: str | Path) -> Iterator[tuple[str, Low]]:
    """`read_peft` map by map: no more than one is in memory. All that can be wrong is told before the first."""
    outline = _outline(model, Path(folder))

    def each() -> Iterator[tuple[str, Low]]:
        with Reader(read_safetensors(outline.file)) as reader:
            keys = {(m["path"], m["part"]): key for key in reader.tensors if (m := KEY.fullmatch(key))}
            for path, (parts, low) in outline.theirs.items():
                yield from split(model, path, parts, _filled(reader, keys, path, low)).items()

    return each()


def outline_peft(model: nn.Module, folder: str | Path) -> dict[str, Low]:
    """`read_peft` without the numbers: tensors on `meta`, from the files' headers alone. Raises as it does."""
    return _outline(model, Path(folder)).ours


def _outline(model: nn.Module, folder: Path) -> _Outline:
    config, paths = read_config(folder), their_paths(model)
    found = _Outline(folder / WEIGHTS, {}, {})
    lows = _headers(config, found.file)
    _require_complete(config, lows, [path for path in paths if config.targets(path)])
    for path, low in lows.items():
        if path not in paths:
            raise ModelError(f"the adapter is for another model: this one has no linear map '{path}'")
        found.theirs[path] = paths[path], low
        found.ours.update(split(model, path, paths[path], low))
    return found


def _low(path: str, method: Adapter, module: nn.Module) -> Low:
    if not isinstance(method, Lora):
        raise UserError(f"{path}: PEFT's LoRA layout has no place for {method.name}; merge it instead")
    held = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
    return Low(method, held["A_RI"], held["B_OR"], held.get("m_O"))


def _tensors(module: nn.Module, low: Low) -> list[tuple[nn.Parameter, Tensor]]:
    parts = {"A_RI": low.A_RI, "B_OR": low.B_OR, "m_O": low.m_O}
    return [(module.get_parameter(name), tensor) for name, tensor in parts.items() if tensor is not None]


def _spell(path: str, low: Low) -> dict[str, Tensor]:
    parts = zip(SPELLED.values(), (low.A_RI, low.B_OR, low.m_O), strict=True)
    return {f"base_model.model.{path}.{part}": t for part, t in parts if t is not None}


def _headers(config: PeftConfig, file: Path) -> dict[str, Low]:
    """The adapter by the checkpoint's paths, its tensors on `meta`."""
    if not file.exists():
        other = " (adapter_model.bin is a pickle, which may run code: convert it)" if _pickled(file) else ""
        raise ModelError(f"{file.parent}: no {WEIGHTS}{other}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, stored in read_safetensors(file).items():
        if not (match := KEY.fullmatch(key)) or "lora_embedding" in key:
            raise ModelError(f"{file}: '{key}' is no LoRA or DoRA of a linear map; merge it with PEFT first")
        parts.setdefault(match["path"], {})[match["part"]] = torch.empty(stored.shape, device="meta")
    return {path: _assemble(config, path, tensors) for path, tensors in parts.items()}


def _filled(reader: Reader, keys: Mapping[tuple[str, str], str], path: str, low: Low) -> Low:
    """What the headers told of, with its numbers; `keys` by path and part."""
    tensors = {}
    for field, part in zip(("A_RI", "B_OR", "m_O"), SPELLED, strict=True):
        if (outline := getattr(low, field)) is not None:
            tensors[field] = torch.empty(outline.shape)
            reader.read(Part(keys[path, part]), tensors[field])
    return replace(low, **tensors)


def _pickled(file: Path) -> bool:
    return file.with_suffix(".bin").exists()


def _assemble(config: PeftConfig, path: str, tensors: Mapping[str, Tensor]) -> Low:
    wanted = set(SPELLED) if config.decomposed else {"A", "B"}
    if wanted != tensors.keys():
        raise ModelError(f"{path}: the adapter holds {sorted(tensors)}, its configuration asks for {sorted(wanted)}")
    low = Low(config.method(path), tensors["A"], tensors["B"], tensors.get("magnitude_vector"))
    if not low.method.rank == low.A_RI.shape[0] == low.B_OR.shape[1]:
        raise ModelError(
            f"{path}: rank {low.method.rank} by {CONFIG}, {low.A_RI.shape[0]} and {low.B_OR.shape[1]} in {WEIGHTS}; "
            "they are not of one adapter"
        )
    return low


def _require_complete(config: PeftConfig, theirs: Mapping[str, Low], meant: list[str]) -> None:
    """Routed experts may be absent: newer checkpoints fuse them, so that PEFT finds no linear map there."""
    absent = [path for path in meant if path not in theirs and "experts" not in path.split(".")]
    if not theirs or absent:
        raise ModelError(
            f"{config.source.parent}: no tensors for {absent[0] if absent else 'any map'}; saved incompletely"
        )


def _write(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The configuration comes last: without it the folder is no adapter."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as draft:
            entries = [Outgoing(key, tuple(t.shape), t.dtype, t.clone) for key, t in tensors.items()]
            write_safetensors(Path(draft) / WEIGHTS, entries)
            write_text(Path(draft) / CONFIG, json.dumps(config, indent=2))
            (folder / CONFIG).unlink(missing_ok=True)
            for name in (WEIGHTS, CONFIG):
                os.replace(Path(draft) / name, folder / name)
