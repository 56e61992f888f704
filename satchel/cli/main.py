"""The app, its verbs, and what becomes of an error: one message on stderr and an exit code, never a traceback."""

import os
import sys
from typing import Annotated

import typer

import satchel
from satchel.cli.batch import batch
from satchel.cli.bench import bench
from satchel.cli.chat import chat
from satchel.cli.console import complain, forgive_encodings, out
from satchel.cli.doctor import doctor
from satchel.cli.list import list_methods
from satchel.cli.merge import merge
from satchel.cli.plan import plan_pretrain, plan_tune
from satchel.cli.pretrain import pretrain
from satchel.cli.serve import serve
from satchel.cli.show import show
from satchel.cli.tune import tune
from satchel.core.errors import SatchelError

# torch's threads wait for each other in a busy loop, and lose 5 to 10 times the work when another program takes a core.
# Sleeping instead costs a few percent on a quiet machine (docs/LOG.md). Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SETTINGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=SETTINGS,
)
plans = typer.Typer(no_args_is_help=True, context_settings=SETTINGS)
app.command("list")(list_methods)
app.command("show")(show)
app.add_typer(plans, name="plan", help="Rehearse a job: does it fit, and what would make it fit?")
plans.command("tune")(plan_tune)
plans.command("pretrain")(plan_pretrain)
app.command("tune")(tune)
app.command("pretrain")(pretrain)
app.command("serve")(serve)
app.command("batch")(batch)
app.command("chat")(chat)
app.command("merge")(merge)
app.command("bench")(bench)
app.command("doctor")(doctor)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the job failed, 2 the input was wrong, 130 interrupted."""
    forgive_encodings()
    try:
        app(args=arguments, prog_name="satchel")
    except SatchelError as fault:
        complain(str(fault))
        sys.exit(fault.exit_code)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(satchel.__version__)
        raise typer.Exit


VERSION = typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)


@app.callback()
def _satchel(version: Annotated[bool, VERSION] = False) -> None:
    """Pack an LLM job into the memory, compute, tokens and data that you have."""
