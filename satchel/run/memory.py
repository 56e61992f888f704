"""What this process holds: resident bytes, and the pages behind torch's CPU tensors.

`install_pool()` puts the page pool (native/page_pool.cpp) behind torch's CPU allocator: from then on the resident
bytes of a job equal its live bytes, a limit can be set as on CUDA, and the peak is read without sampling.
"""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from satchel.native.build import build

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
CGROUP = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
LARGE = 256 << 10  # bytes
CGROUP_FILES = (  # limit and use, of version 2 and of version 1
    (CGROUP / "memory.max", CGROUP / "memory.current"),
    (CGROUP / "memory/memory.limit_in_bytes", CGROUP / "memory/memory.usage_in_bytes"),
)


class _Stats(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("live", "peak", "free", "faulted", "moved", "limit", "small")]


@dataclass(frozen=True)
class Pool:
    """The installed page pool. All figures are bytes of CPU tensors."""

    library: ctypes.CDLL

    def _stats(self) -> _Stats:
        out = _Stats()
        self.library.satchel_pool_stats(ctypes.byref(out))
        return out

    @property
    def live_bytes(self) -> int:
        """In use now."""
        return self._stats().live

    @property
    def peak_bytes(self) -> int:
        """The most in use since `reset_peak`."""
        return self._stats().peak

    @property
    def resident_bytes(self) -> int:
        """In the pool's own pages, in use or kept for reuse; tensors under 16 KiB lie in the C library's heap."""
        stats = self._stats()
        return stats.live - stats.small + stats.free

    def reset_peak(self) -> None:
        """Start a new peak from what is in use now."""
        self.library.satchel_pool_reset_peak()

    def limit(self, limit_bytes: int | None) -> None:
        """Make allocations fail with torch.OutOfMemoryError that would take the pool's pages in use past `limit_bytes`;
        None lifts the limit."""
        self.library.satchel_pool_limit(ctypes.c_size_t(limit_bytes or 0))

    def trim(self) -> None:
        """Give the free pages back to the system."""
        self.library.satchel_pool_trim()


@cache
def install_pool() -> Pool | None:
    """Put the page pool behind torch's CPU tensors, once a process; None where it cannot be built (Linux, C++)."""
    path = build("page_pool") if sys.platform == "linux" else None
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.satchel_pool_install()
    return Pool(library)


def tame_heap() -> None:
    """Have the C library give back what it would keep: in glibc, few arenas for all threads, and large buffers in maps
    of their own, however many came before. Nothing where there is no glibc; tensors are the page pool's either way."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        for option, value in ((M_ARENA_MAX, 2), (M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, LARGE)):
            library.mallopt(option, value)


def trim_heap() -> None:
    """Give free pages of the C library's heap back to the system (glibc)."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def resident_bytes() -> int:
    """Bytes of this process that lie in memory now."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The most that lay in memory since `reset_peak_resident` (Linux), or since the process began."""
    if STATUS.exists():
        return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if "VmHWM" in line)
    return getattr(psutil.Process().memory_info(), "peak_wset", resident_bytes())


def reset_peak_resident() -> None:
    """Start a new peak of resident bytes from now, where the system can (Linux)."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return


def available_bytes() -> int:
    """Bytes that this process could still take: the machine's free memory, or its control group's if that is less."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            ceiling = (Path("/sys/fs/cgroup") / limit).read_text().strip()
            if ceiling.isdigit():
                free = min(free, int(ceiling) - int((Path("/sys/fs/cgroup") / used).read_text()))
        except OSError:
            continue
    return max(free, 0)
