"""Command-line options made from the fields of the job, so that no knob is written down twice."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from satchel.core.job import Job
from satchel.core.knobs import REQUIRED, Knob

KINDS = {"int": int, "float": float, "bool": bool, "str": str, "tuple[str, ...]": list[str]}  # the last: given often
CONFIG_HELP = "TOML file with any of these options as keys; options given here win."


def takes_job(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn `verb(job, **own)` into a command with `--config`, an option for every field of the job, and its own.

    The annotation of `job` says which kind of job.
    """
    job, *own = inspect.signature(verb, eval_str=True).parameters.values()
    kind: type[Job] = job.annotation

    def command(**given: Any) -> None:
        mine = {parameter.name: given.pop(parameter.name) for parameter in own}
        verb(_job(kind, given.pop("config"), given), **mine)

    knobs = sorted(kind.knobs(), key=lambda knob: knob.default is not REQUIRED)
    parameters = [_config(), *(_option(knob, kind.slots) for knob in knobs), *own]
    parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)  # those that must be given
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = verb.__doc__
    return command


def _job(kind: type[Job], config: Path | None, given: dict[str, Any]) -> Job:
    overrides = {name: value for name, value in given.items() if value is not None and value != []}
    if config is None:
        return kind.from_dict(overrides)
    return kind.from_toml(config, **overrides)


def _config() -> inspect.Parameter:
    annotation = Annotated[Path | None, typer.Option("--config", help=CONFIG_HELP, rich_help_panel="Job")]
    return inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _option(knob: Knob, slots: tuple[str, ...]) -> inspect.Parameter:
    """An option whose own default is None: what was not given leaves the file's value, or the field's."""
    flag = "--" + knob.name.replace("_", "-")
    option = typer.Option(
        f"{flag}/--no{flag[1:]}" if knob.kind == "bool" else flag,
        help=escape(_help(knob)),
        show_default=False,
        rich_help_panel="Methods" if knob.name in slots else "Job",
    )
    annotation = Annotated[KINDS[knob.kind] | None, option]
    return inspect.Parameter(knob.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _help(knob: Knob) -> str:
    """The comment as a sentence, and the default that holds unless the file or the command line gives another."""
    often = " May be given several times." if knob.kind.startswith("tuple") else ""
    sentence = knob.comment[:1].upper() + knob.comment[1:] + "." + often
    return sentence if knob.default in (REQUIRED, "", ()) else f"{sentence} [{str(knob.default).lower()}]"
