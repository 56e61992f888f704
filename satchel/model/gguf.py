"""The GGUF container, versions 2 and 3: metadata, and where each tensor lies.

Reads the header only; `stored.Reader` reads the tensors. A header that ends early, points outside of the file or
uses a type that we cannot decode is a ModelError that says what to do.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satchel.core.errors import ModelError
from satchel.model.encodings import ENCODINGS
from satchel.model.stored import Stored

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TENSOR_TYPES = (
    {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"}
    | {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
    | {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
    | {29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
)
LONGEST = 1 << 32  # no count in a sound header is larger; a larger one would only exhaust memory before failing
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufFile:
    """The header: metadata as Python values, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file. ModelError if it is none, is cut off, or holds what we cannot decode."""
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                f"{path}: not a GGUF file (it does not start with 'GGUF'); check that it was fetched whole"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                return _header(path, _Cursor(mapped, 4))
            except (struct.error, UnicodeDecodeError, RecursionError, OverflowError, _Damaged) as error:
                raise ModelError(f"{path}: the GGUF header is damaged or cut off ({error}); fetch it again") from error


class _Damaged(Exception):
    pass


class _Cursor:
    """Walks over the mapped header. Nothing is read past the end unnoticed."""

    def __init__(self, mapped: mmap.mmap, at: int) -> None:
        self.mapped, self.at = mapped, at

    def unpack(self, code: str, count: int = 1) -> tuple[Any, ...]:
        if count > LONGEST:
            raise _Damaged(f"a list of {count} numbers")
        form = f"<{count}{code}"
        values = struct.unpack_from(form, self.mapped, self.at)
        self.at += struct.calcsize(form)
        return values

    def number(self, code: str) -> Any:
        return self.unpack(code)[0]

    def string(self) -> str:
        length = self.number("Q")
        end = self.at + length
        if end > len(self.mapped):
            raise _Damaged(f"a string of {length} bytes at byte {self.at}")
        text = self.mapped[self.at : end].decode()
        self.at = end
        return text

    def strings(self, count: int) -> list[str]:
        """`count` strings: a vocabulary has a hundred thousand, so the loop is a short one."""
        mapped, at, unpack, found = self.mapped, self.at, _LENGTH.unpack_from, []
        for _ in range(count):
            start = at + 8
            at = start + unpack(mapped, at)[0]
            found.append(mapped[start:at])
        if at > len(mapped):
            raise _Damaged(f"a string that ends at byte {at}")
        self.at = at
        return [text.decode() for text in found]

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.unpack("I")[0], self.number("Q")
            if inner in SCALARS:
                return list(self.unpack(SCALARS[inner], count))
            if inner == STRING:
                return self.strings(count)
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise _Damaged(f"a value of unknown type {kind} at byte {self.at}")
        return self.number(SCALARS[kind])


def _header(path: Path, cursor: _Cursor) -> GgufFile:
    version = cursor.number("I")
    if version not in (2, 3):
        raise ModelError(
            f"{path}: GGUF version {version} (a big-endian file, or older than 2023); we read 2 and 3: "
            "convert the model again with a current llama.cpp"
        )
    tensors, entries = cursor.unpack("Q", 2)
    metadata = {}
    for _ in range(entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    infos = [_tensor_info(path, cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Damaged(f"an alignment of {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    stored = {name: Stored(name, shape, dtype, path, base + offset) for name, shape, dtype, offset in infos}
    _check_ends(path, stored, len(cursor.mapped))
    return GgufFile(path, metadata, stored)


def _tensor_info(path: Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    name = cursor.string()
    shape = cursor.unpack("Q", cursor.number("I"))[::-1]  # the file counts dimensions from the fastest
    code, offset = cursor.number("I"), cursor.number("Q")
    dtype = TENSOR_TYPES.get(code, f"type {code}")
    if dtype not in ENCODINGS:
        readable = ", ".join(t for t in TENSOR_TYPES.values() if t in ENCODINGS and not t.startswith("I"))
        raise ModelError(f"{path}: tensor '{name}' is stored as {dtype}; take a file of another type: {readable}")
    if shape and shape[-1] % ENCODINGS[dtype].values:
        raise _Damaged(f"rows of {shape[-1]} numbers in '{name}' are no whole blocks of {dtype}")
    return name, shape, dtype, offset


def _check_ends(path: Path, tensors: dict[str, Stored], size: int) -> None:
    end = max(
        (t.start + math.prod(t.shape) // t.encoding.values * t.encoding.nbytes for t in tensors.values()), default=0
    )
    if end > size:
        raise ModelError(f"{path}: cut off at {size} bytes of {end}; fetch the file again")
