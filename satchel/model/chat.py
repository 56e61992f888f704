"""Chat templates: messages in, the model's own text out, and which characters of it the assistant wrote.

A template comes with the model and is not trusted: it runs in jinja's immutable sandbox, and sees plain values only.
`{% generation %}` blocks say what the assistant wrote. A template without them is rendered turn by turn: what turn i
adds to the text of the turns before it (with the assistant's header) is what the assistant wrote.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from satchel.core.errors import ModelError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # characters [start, end)

OPEN, CLOSE = "\U000f5a7c", "\U000f5a7d"  # private-use marks around what a generation block rendered


class ChatTemplate:
    """One template with the values that it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        self.text, self.names = text, dict(names)
        try:
            self._compiled = _compile(text)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template cannot be read: {error}; give another one") from error

    def render(self, messages: Messages, generate: bool = False, tools: Messages | None = None) -> str:
        """The text of the messages; `generate` adds the header of the assistant's next turn, `tools` are announced."""
        return re.sub(f"[{OPEN}{CLOSE}]", "", self._marked(messages, generate, tools))

    def spans(self, messages: Messages, ends: Sequence[str]) -> tuple[str, list[Span]]:
        """The text, and where in it the assistant wrote, with the end-of-turn token.

        `ends` are the tokenizer's special tokens: white space that the template puts after one is not the assistant's.
        ModelError if the template has no generation blocks and rewrites earlier turns.
        """
        marked = self._marked(messages, False)
        if OPEN in marked:
            return _unmark(marked)
        spans = [self._turn(messages, i, marked) for i, m in enumerate(messages) if m.get("role") == "assistant"]
        return marked, [_trim(marked, span, ends) for span in spans]

    def _turn(self, messages: Messages, i: int, text: str) -> Span:
        header, turn = self.render(messages[:i], generate=True), self.render(messages[: i + 1])
        if text.startswith(header) and turn.startswith(header):
            # A turn that later ones follow may lack what it has as the last: Qwen 3 drops its thinking.
            content = str(messages[i].get("content") or "").strip()
            tail = turn[len(header) :].rpartition(content)[2] if content else ""
            for said in (turn[len(header) :], content + tail):
                if said and text.startswith(said, len(header)):
                    return len(header), len(header) + len(said)
        raise ModelError(
            "the model's chat template rewrites earlier turns, so its answers cannot be told apart; train on one "
            "answer per conversation, or on a template whose answers lie in {% generation %} blocks"
        )

    def _marked(self, messages: Messages, generate: bool, tools: Messages | None = None) -> str:
        # Nothing with methods reaches the template.
        plain, plain_tools = json.loads(json.dumps([list(messages), tools and list(tools)]))
        try:
            return self._compiled.render(
                messages=plain, tools=plain_tools, documents=None, add_generation_prompt=generate, **self.names
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise ModelError(f"the model's chat template refuses messages of the roles {roles}: {error}") from error


def _unmark(marked: str) -> tuple[str, list[Span]]:
    parts = re.split(f"({OPEN}|{CLOSE})", marked)
    text, spans, start = "", [], 0
    for part in parts:
        if part == OPEN:
            start = len(text)
        elif part == CLOSE:
            spans.append((start, len(text)))
        else:
            text += part
    return text, spans


def _trim(text: str, span: Span, ends: Sequence[str]) -> Span:
    kept = text[span[0] : span[1]].rstrip()
    return (span[0], span[0] + len(kept)) if kept.endswith(tuple(ends)) else span


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: the block's text between two marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


@lru_cache(maxsize=8)
def _compile(text: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(text)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
