"""The safetensors container: 8 bytes of header length, a JSON header, the tensors' bytes.

Our own, so that a load can be mapped piece by piece and give its pages back, and a save can stream tensors that it
makes one at a time. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from satchel.core.errors import ModelError
from satchel.model.disk import write_pieces
from satchel.model.encodings import PLAIN
from satchel.model.stored import Stored

LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
SPELLED = {dtype: name for name, dtype in PLAIN.items()}


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one file, by name. ModelError if it is cut off, damaged, or holds a type that we cannot read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER or 8 + length > size:
            raise ModelError(f"{path}: header of {length} bytes in a file of {size}: no safetensors file, or cut off")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: _stored(path, name, entry, 8 + length, size) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: the safetensors header is damaged ({error!r}); fetch the file again") from error


def _stored(path: Path, name: str, entry: dict[str, Any], base: int, size: int) -> Stored:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in PLAIN:
        raise ModelError(f"{path}: tensor '{name}' is stored as {dtype}; we read {', '.join(PLAIN)}")
    if not 0 <= start <= end or base + end > size:
        raise ModelError(f"{path}: tensor '{name}' ends at byte {base + end} of {size}: cut off; fetch the file again")
    if end - start != math.prod(shape) * PLAIN[dtype].itemsize:
        raise ModelError(f"{path}: tensor '{name}' has {end - start} bytes for {dtype} {list(shape)}: damaged")
    return Stored(name, shape, dtype, path, base + start)


def read_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder: `model.safetensors`, or the shards that its index names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return _read_shards(folder, index)
    if single.exists():
        return read_safetensors(single)
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    why = f" ({others[0]} is a pickle, which may run code)" if others else ""
    raise ModelError(
        f"{folder}: no weights: neither model.safetensors nor its index{why}; fetch the whole folder, as safetensors "
        "(pretraining from random weights, --scratch, needs none)"
    )


def _read_shards(folder: Path, index: Path) -> dict[str, Stored]:
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: no 'weight_map' of tensor names to files; fetch it again") from error
    outside = [name for name in files if Path(name).name != name]
    absent = [name for name in files if not (folder / name).exists()]
    if outside or absent:
        raise ModelError(
            f"{folder}: {len(outside + absent)} shard(s) missing, first {(outside + absent)[0]}; fetch them"
        )
    tensors: dict[str, Stored] = {}
    for name in files:
        tensors |= read_safetensors(folder / name)
    return tensors


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written, which is made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[Outgoing]) -> None:
    """Write a file and flush it to the disk; one tensor at a time is in memory."""
    write_pieces(path, chain([header(tensors)], (plain_bytes(tensor.make()) for tensor in tensors)))


def plain_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them: its own memory if it is contiguous and on the CPU, else a copy."""
    return tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data


def header(tensors: Sequence[Outgoing]) -> bytes:
    """What a file of these tensors, in this order, begins with."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        spelled = {"dtype": SPELLED[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        entries[tensor.name] = spelled
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
