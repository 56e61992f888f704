"""`satchel serve`: an OpenAI server inside a memory budget."""

import sys
from typing import Annotated

import typer
from rich.text import Text

from satchel.cli.console import err, out
from satchel.cli.extras import needs
from satchel.cli.options import takes_job
from satchel.core.serve import ServeJob, Terms
from satchel.core.units import parse_bytes, parse_seconds

PANEL = "Server"


@takes_job
def serve(
    job: ServeJob,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=PANEL)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535, rich_help_panel=PANEL)] = 8000,
    api_keys: Annotated[
        str,
        typer.Option(
            help="TOML file of clients with their keys and quotas.", show_default=False, rich_help_panel=PANEL
        ),
    ] = "",
    queue: Annotated[
        int, typer.Option(help="Requests open at once; more are told to wait.", min=1, rich_help_panel=PANEL)
    ] = 256,
    timeout: Annotated[str, typer.Option(help="Longest time of an answer.", rich_help_panel=PANEL)] = "10min",
    drain: Annotated[str, typer.Option(help="At the end, time for what runs.", rich_help_panel=PANEL)] = "30s",
    max_body: Annotated[str, typer.Option(help="Longest body.", rich_help_panel=PANEL)] = "1MiB",
    replicas: Annotated[
        int, typer.Option(help="Engines behind one address, which share the memory.", min=1, rich_help_panel=PANEL)
    ] = 1,
) -> None:
    """Serve a model to any OpenAI client, inside the budget. SIGTERM or ctrl-C ends it in good order."""
    with needs("serve"):
        from satchel.run.server.logs import log_to
        from satchel.run.server.replicas import serve_replicas
        from satchel.run.server.start import Serving

    terms = Terms(queue, parse_bytes(max_body), parse_seconds(timeout), drain_s=parse_seconds(drain))
    log_to(sys.stderr)
    with err.status(f"loading {job.model}") as status:

        def note(line: str) -> None:
            status.stop()
            out.print(Text(line), soft_wrap=True)

        if replicas > 1:
            serve_replicas(job, replicas, host, port, api_keys, terms, note)
        else:
            Serving(job, host, port, api_keys, terms).run(note)
