"""Tools: into the prompt by the model's own template, and calls of them out of what the model says.

Models write calls in one of two ways, and their template shows which:

    <tool_call>{"name": "f", "arguments": {...}}</tool_call>        Qwen, Hermes, SmolLM
    {"name": "f", "parameters": {...}}, or a list of such           Llama, Mistral

Only whole calls of tools that are there count; anything else stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from satchel.model.tokenizer import Tokenizer
from satchel.run.server.faults import Fault
from satchel.run.server.wire import ChatBody, Message, NamedTool
from satchel.run.text import StopTexts

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAGGED = re.compile(rf"{OPEN}\s*(.*?)\s*(?:{CLOSE}|\Z)\s*", re.DOTALL)
MARKS = ("[TOOL_CALLS]", "<|python_tag|>")  # before bare calls
Call = dict[str, Any]


class Toolbox:
    """The tools of one request."""

    def __init__(self, tokenizer: Tokenizer, body: ChatBody) -> None:
        template = tokenizer.chat_template or ""
        self.tools = [] if body.tool_choice == "none" else body.tools or []
        self.tagged = OPEN in template
        self.choice = body.tool_choice
        if self.tools and "tools" not in template:
            raise Fault(
                400,
                "this model's chat template knows no tools; leave them out, or serve a model that has them",
                param="tools",
            )

    @property
    def rendered(self) -> list[dict[str, Any]] | None:
        """The tools as templates read them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools] or None

    @property
    def forced(self) -> list[dict[str, Any]]:
        """Schemas of the calls of which the answer must be one; none if it may be text."""
        if self.choice == "required":
            chosen = self.tools
        elif isinstance(self.choice, NamedTool):
            chosen = [tool for tool in self.tools if tool.function.name == self.choice.function.name]
        else:
            return []
        return [_schema(tool.function.name, tool.function.parameters) for tool in chosen]

    def message(self, message: Message) -> dict[str, Any]:
        """A turn as templates read it: the arguments of calls are objects."""
        plain = message.model_dump(exclude_none=True, exclude={"refusal"})
        plain.setdefault("content", message.refusal or "")
        for call in plain.get("tool_calls", ()):
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        return plain

    def read(self, text: str) -> tuple[str | None, list[Call]]:
        """The text without its calls (None if nothing is left), and the calls."""
        if not self.tools:
            return text, []
        rest, calls = self._tagged(text) if self.tagged else self._bare(text)
        return (rest if rest.strip() or not calls else None), calls

    def reader(self) -> Reader:
        """Reads one answer piece by piece."""
        return Reader(self)

    def _tagged(self, text: str) -> tuple[str, list[Call]]:
        calls: list[Call] = []

        def take(match: re.Match[str]) -> str:
            found = self._calls(match[1])
            calls.extend(found)
            return "" if found else match[0]

        return TAGGED.sub(take, text), calls

    def _bare(self, text: str) -> tuple[str, list[Call]]:
        bare = text.strip()
        for mark in MARKS:
            bare = bare.removeprefix(mark)
        calls = self._calls(bare)
        return ("", calls) if calls else (text, [])

    def _calls(self, text: str) -> list[Call]:
        """The calls that a JSON text holds; none if it is anything else."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return []
        names = {tool.function.name for tool in self.tools}
        found = found if isinstance(found, list) else [found]
        if not found or not all(isinstance(call, dict) and call.get("name") in names for call in found):
            return []
        return [_call(call) for call in found]


class Reader:
    """Lets text through that is no call, and holds back what may become one until the end."""

    def __init__(self, toolbox: Toolbox) -> None:
        self.toolbox = toolbox
        self._all, self._sent = "", 0
        self._gate = StopTexts((OPEN,)) if toolbox.tools and toolbox.tagged else None

    def push(self, text: str, is_last: bool) -> tuple[str, list[Call]]:
        """What is certainly text; at the end the rest of it, and the calls."""
        if not self.toolbox.tools:
            return text, []
        self._all += text
        if is_last:
            rest, calls = self.toolbox.read(self._all)
            return (rest or "")[self._sent :], calls
        if self._gate is not None:
            out = self._gate.push(text)
        elif self._may_call():
            out = ""
        else:
            out = self._all[self._sent :]
        self._sent += len(out)
        return out, []

    def _may_call(self) -> bool:
        start = self._all.lstrip()
        return not start or start[0] in "{[" or any(mark.startswith(start[: len(mark)]) for mark in MARKS)


def _schema(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _call(call: dict[str, Any]) -> Call:
    arguments = call.get("arguments", call.get("parameters", {}))
    said = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call["name"], "arguments": said},
    }


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Fault(
            400, f"the arguments of a call are JSON in a text, not {text[:60]!r}", param="messages.tool_calls"
        ) from None
