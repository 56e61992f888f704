"""What this machine can do at most, measured in the bench's own run: `python -m bench._decode_limits JSON`."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from ctypes import c_double, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from satchel.model.config import ModelConfig
from satchel.native.build import compiler

SOURCE = Path(__file__).with_suffix(".cpp")
FAR = 512 << 20  # bytes: no cache holds them


@dataclass(frozen=True)
class Limits:
    """Of one machine, with as many threads as the engines have."""

    bytes_s: float
    operations_s: float

    def seconds(self, read_bytes: float, operations: float) -> float:
        """What a step takes at least: bytes and operations overlap."""
        return max(read_bytes / self.bytes_s, operations / self.operations_s)


@dataclass(frozen=True)
class Shape:
    """What a decoder reads and computes, whatever runs it."""

    weight_bytes: int  # as the file holds them, each read once a step
    products: int  # weights that a token is multiplied by, the head's left out
    head: int  # of these in the head
    layers: int
    attention: int  # query heads times their dimension
    token_bytes: int  # keys and values of a token, 16 bits each, all layers

    @classmethod
    def of(cls, config: ModelConfig, weight_bytes: int) -> Shape:
        """The shape of a dense decoder."""
        width, kv, queries = config.width, config.kv_heads * config.head_dim, config.heads * config.head_dim
        layer = width * (2 * queries + 2 * kv + 3 * config.hidden)
        head, token_bytes = width * config.vocab, 4 * config.layers * kv
        return cls(weight_bytes, config.layers * layer, head, config.layers, queries, token_bytes)

    def prefill(self, tokens: int) -> tuple[float, float]:
        """Bytes and operations of a prompt, with the logits of its last token. A key is met by half of the queries."""
        products = 2 * (self.products * tokens + self.head)
        return self.weight_bytes, products + 2 * self.layers * self.attention * tokens**2

    def decode(self, past: int, batch: int = 1) -> tuple[float, float]:
        """Bytes and operations of one step of `batch` answers, each after `past` tokens."""
        operations = 2 * (self.products + self.head) + 4 * self.layers * self.attention * past
        return self.weight_bytes + batch * past * self.token_bytes, batch * operations


def main(case: dict[str, Any]) -> dict[str, float]:
    """The best of some tries of each."""
    threads, tries = case["threads"], 1 if case["quick"] else 7
    kernel = library()
    far = torch.ones(FAR >> (4 if case["quick"] else 0), dtype=torch.uint8)
    reads = [kernel.satchel_read_rate(far.data_ptr(), far.numel(), threads) for _ in range(tries)]
    products = [kernel.satchel_product_rate(threads, 50) for _ in range(tries)]
    return {"bytes_s": max(reads), "operations_s": max(products)}


def library() -> ctypes.CDLL:
    """The probe, compiled for this machine."""
    cxx = compiler()
    if cxx is None:
        raise SystemExit("the limits of this machine are measured in C++, and there is no compiler; install g++")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        headers = f"-I{SOURCE.parent.parent / 'satchel' / 'native'}"
        flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", headers]
        subprocess.run([cxx, *flags, str(SOURCE), "-o", str(path)], check=True)
        kernel = ctypes.CDLL(str(path))
    kernel.satchel_read_rate.argtypes, kernel.satchel_read_rate.restype = [c_void_p, c_size_t, c_int], c_double
    kernel.satchel_product_rate.argtypes, kernel.satchel_product_rate.restype = [c_int, c_int], c_double
    return kernel


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
