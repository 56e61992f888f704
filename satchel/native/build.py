"""Compile a C++ file of this folder, once, into the user's cache.

The result is keyed by the compiler's command, the source, the version of torch and the processor, so that a change of
one compiles anew. A machine without a compiler gets None and the caller falls back to what torch offers.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

CACHE = Path.home() / ".cache" / "satchel" / "native"
TORCH = Path(torch.__file__).parent
CPUINFO = Path("/proc/cpuinfo")

WITH_TORCH = ("-O2", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}")
# Nobody looks at errno or the floating-point flags.
SOUND = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-Wno-psabi")
# For arithmetic on arrays: vectors as wide as the processor has. No rounding differs from what the source says, so none
# of -ffast-math.
ARITHMETIC = (*SOUND, "-march=native", "-ffp-contract=off")
FUSED = (*SOUND, "-march=native", "-ffp-contract=fast")  # where fused multiply-add is welcome


def compiler() -> str | None:
    """Path of the C++ compiler that would be used."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def build(name: str, flags: tuple[str, ...] = WITH_TORCH, cache: Path = CACHE) -> Path | None:
    """The shared library of `name`.cpp, compiled on first use (1-3 s); None where that is not possible.

    Two processes may build at once: each writes a file of its own and renames it into place.
    """
    source, cxx = Path(__file__).with_name(f"{name}.cpp"), compiler()
    if cxx is None:
        return None
    command = [cxx, "-std=c++20", "-shared", "-fPIC", str(source), *flags]
    headers = [header.read_text() for header in sorted(source.parent.glob("*.h"))]
    made_of = (*command, source.read_text(), *headers, torch.__version__, processor())
    target = cache / f"{name}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                library = Path(folder) / target.name
                subprocess.run([*command, "-o", str(library)], check=True, capture_output=True, timeout=300)
                os.replace(library, target)
        except (OSError, subprocess.SubprocessError):
            return None
    return target


def processor() -> str:
    """What -march=native depends on; homes are shared between machines."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
