"""`satchel batch`: a file of requests into a file of answers, without a server."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from satchel.cli.console import err, out
from satchel.cli.extras import needs
from satchel.cli.options import takes_job
from satchel.core.serve import ServeJob


@takes_job
def batch(
    job: ServeJob,
    source: Annotated[Path, typer.Argument(help="JSON lines of requests, as OpenAI's batches have them.")],
    target: Annotated[Path, typer.Argument(help="File for the answers; one that is there is gone on with.")],
) -> None:
    """Answer a file of requests, inside the budget. The same command goes on where it was stopped."""
    with needs("serve"):
        from satchel.run.server.offline import run_batch

    with err.status(f"loading {job.model}") as status:
        done = run_batch(job, source, target, lambda said, of: status.update(f"{said} of {of} answered"))
    before = f", {done.before} of them before" if done.before else ""
    wrong = f"; {done.failed} are errors" if done.failed else ""
    out.print(Text(f"{done.lines} lines answered{before}{wrong}: {target}"), soft_wrap=True)
    sys.exit(1 if done.failed else 0)
