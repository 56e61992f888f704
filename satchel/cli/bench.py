"""`satchel bench NAME`: one comparison on this machine, with the peers that are installed."""

import subprocess
import sys
from typing import Annotated

import typer

from satchel.core.book import PACKAGE
from satchel.core.errors import UnknownName, UserError


def bench(name: Annotated[str, typer.Argument(help="A file of bench/, such as tune.", show_default=False)]) -> None:
    """Run bench/NAME.py of the checkout, which writes bench/results/NAME.json."""
    folder = PACKAGE.parent / "bench"
    if not folder.is_dir():
        raise UserError("benches live in the source checkout, not in the installed package; clone it and run there")
    known = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if name not in known:
        raise UnknownName("bench", name, known)
    finished = subprocess.run([sys.executable, "-m", f"bench.{name}"], cwd=PACKAGE.parent)
    raise typer.Exit(finished.returncode)
