"""`satchel merge`: an adapter becomes part of its model."""

from pathlib import Path
from typing import Annotated

import typer

from satchel.cli.console import out


def merge(
    model: Annotated[str, typer.Argument(help="The model that was tuned.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)],
    to: Annotated[Path, typer.Argument(help="Folder to write; must not exist.", show_default=False)],
) -> None:
    """Merge an adapter into its model, check the result against the unmerged one, and write it."""
    from satchel.run.export import merge as run_merge

    run_merge(model, adapter, to)
    out.print(f"merged model in {to}", markup=False)
