"""Which instructions a kernel may use: the levels, and which of them this processor has.

amx        AVX-512, tiles of bfloat16 and 8 bits    Xeons since 2023
avx512     AVX-512 with 8-bit dot products          Xeons since 2019, Zen 4 and 5
avxvnni    256 bits with 8-bit dot products         laptops since 2021
avx2       256 bits                                 nearly every x86 since 2015
portable   what the compiler makes of it            everything else
"""

from functools import cache

from satchel.native.build import CPUINFO, SOUND

_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")
_AVX2 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_TILES = ("avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
NEEDS = {
    "amx": _AVX2 + _AVX512 + _TILES,
    "avx512": _AVX2 + _AVX512,
    "avxvnni": (*_AVX2, "avx_vnni"),
    "avx2": _AVX2,
    "portable": (),
}
FLAGS = {
    "amx": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512": ("-march=x86-64-v4", "-mavx512vnni"),
    "avxvnni": ("-march=x86-64-v3", "-mavxvnni"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}
MORE = {"avx512": {"avx512_bf16": "-mavx512bf16"}}  # what only some processors of a level have
LEVELS = tuple(NEEDS)  # the fastest first


@cache
def supported() -> tuple[str, ...]:
    """The levels that this processor has, the fastest first."""
    found = _features()
    return tuple(level for level, needs in NEEDS.items() if found.issuperset(needs))


def flags(level: str) -> tuple[str, ...]:
    """The compiler's flags for a level."""
    more = [flag for feature, flag in MORE.get(level, {}).items() if feature in _features()]
    return (*SOUND, "-ffp-contract=fast", *FLAGS[level], *more)  # fused multiply-add is welcome


def _features() -> frozenset[str]:
    """What the kernel says that the processor has."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith("flags") for word in line.partition(":")[2].split())
