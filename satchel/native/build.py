"""Compile a C++ file of this folder against the installed torch, once, into the user's cache.

The result is keyed by source, torch version and compiler, so an upgrade of either compiles anew. A machine without a
compiler gets None and the caller falls back to what torch offers.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

CACHE = Path.home() / ".cache" / "satchel" / "native"


def compiler() -> str | None:
    """Path of the C++ compiler that would be used."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def build(name: str, cache: Path = CACHE) -> Path | None:
    """The shared library of `name`.cpp, compiled on first use (about 3 s); None where that is not possible.

    Two processes may build at once: each writes a file of its own and renames it into place.
    """
    source, cxx = Path(__file__).with_name(f"{name}.cpp"), compiler()
    if cxx is None:
        return None
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode() + cxx.encode()).hexdigest()[:16]
    target = cache / f"{name}-{key}.so"
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                library = Path(folder) / target.name
                subprocess.run(_command(cxx, source, library), check=True, capture_output=True, timeout=300)
                os.replace(library, target)
        except (OSError, subprocess.SubprocessError):
            return None
    return target


def _command(cxx: str, source: Path, library: Path) -> list[str]:
    root = Path(torch.__file__).parent
    return [
        *(cxx, "-O2", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(source), "-o", str(library)),
        *(f"-L{root / 'lib'}", "-lc10", f"-Wl,-rpath,{root / 'lib'}"),
    ]
