"""`satchel chat`: talk to a model in the terminal."""

import sys
from typing import Annotated

import typer
from rich.text import Text

from satchel.cli.console import err, out
from satchel.core.errors import UserError

HELP = "/reset forgets the conversation, /exit leaves, ctrl-C stops an answer."


def chat(
    model: Annotated[str, typer.Argument(help="'demo', a folder, a .gguf file or a hub id.")] = "demo",
    adapter: Annotated[str, typer.Option(help="Folder of an adapter to put on the model.", show_default=False)] = "",
    prompt: Annotated[str, typer.Option(help="Answer this and exit; - reads it from stdin.", show_default=False)] = "",
    system: Annotated[str, typer.Option(help="Instruction before the conversation.", show_default=False)] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, without a template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="Randomness; 0 takes the likeliest token.", min=0.0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of the probability to draw from.", min=0.01, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the random draws.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16 or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Chat with a model in the terminal, streaming; or answer one prompt."""
    if dtype not in ("bf16", "fp32"):
        raise UserError(f"chat: dtype={dtype!r} is not allowed; it is bf16 or fp32")
    if raw and not prompt:
        raise UserError("chat: --raw continues a prompt; give one with --prompt")
    prompt = sys.stdin.read() if prompt == "-" else prompt
    speaker = _Speaker(model, adapter, dtype, device, system)
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if prompt:
        speaker.answer(prompt, raw, settings)
    else:
        _converse(speaker, settings)


class _Speaker:
    """A loaded model and the conversation so far."""

    def __init__(self, model: str, adapter: str, dtype: str, device: str, system: str) -> None:
        import torch

        from satchel.adapt import load_peft
        from satchel.core.book import make
        from satchel.model.load import load
        from satchel.model.source import find_source, load_tokenizer
        from satchel.model.storage import storage
        from satchel.run.device import resolve

        with err.status(f"loading {model}"):
            source = find_source(model)
            self.tokenizer = load_tokenizer(source)
            device = resolve(device)
            kind = torch.bfloat16 if dtype == "bf16" else torch.float32
            format = make("format", storage("auto", source, device, kind))
            self.model = load(source, kind, device, format, frozen=True)
            if adapter:
                load_peft(self.model, adapter)
        self.system = system
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, raw: bool, settings: dict) -> None:
        """Stream the answer to stdout and remember it; an interrupted one is forgotten with its question."""
        from satchel.run.generate import generate

        asked = [*self.messages, {"role": "user", "content": text}]
        said = generate(self.model, self.tokenizer, text if raw else asked, on_text=_write, **settings)
        _write("\n")
        self.messages = [*asked, {"role": "assistant", "content": said}]


def _converse(speaker: _Speaker, settings: dict) -> None:
    out.print(Text(HELP, "dim"))
    while True:
        try:
            line = out.input("[bold]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            speaker.reset()
        elif line.startswith("/"):
            out.print(Text(f"no command {line}; {HELP}", "yellow"))
        elif line:
            _answer_or_stop(speaker, line, settings)


def _answer_or_stop(speaker: _Speaker, line: str, settings: dict) -> None:
    try:
        speaker.answer(line, False, settings)
    except KeyboardInterrupt:
        out.print(Text("\n(stopped)", "dim"))
    except UserError as fault:
        out.print(Text(str(fault), "red"))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
