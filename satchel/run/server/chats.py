"""`/v1/chat/completions`: the model's own template makes the prompt; tool calls are read back from what it says."""

from __future__ import annotations

import asyncio
from typing import Any

from satchel.core.errors import UserError
from satchel.core.request import Event, Logprob, MakesConstraint, Request
from satchel.run.server.faults import refused
from satchel.run.server.house import House
from satchel.run.server.replies import FINISH, Form, Reply, Said
from satchel.run.server.spelling import Spelling
from satchel.run.server.tools import Toolbox
from satchel.run.server.wire import ChatBody


async def chat(house: House, body: ChatBody, tenant: str, request_id: str) -> Reply:
    """Submits a conversation. Raises Fault or UserError for what cannot be answered."""
    adapter = house.adapter(body.model)
    house.admit(1)
    toolbox = Toolbox(house.tokenizer, body)
    text = await _prompt(house, body, toolbox)
    constraint = await house.grammar.calls(toolbox) or await house.grammar.constraint(body.response_format)
    request = _request(house, body, await house.encode(text, special=False), adapter, tenant, constraint)
    form = ChatForm(house, body, toolbox)
    return Reply(house, form, await house.submit([request]), body.model or house.name, request_id)


async def _prompt(house: House, body: ChatBody, toolbox: Toolbox) -> str:
    messages = [toolbox.message(message) for message in body.messages]
    try:
        return await asyncio.to_thread(house.tokenizer.chat, messages, True, toolbox.rendered)
    except UserError as error:
        raise refused(error, "messages") from None


def _request(
    house: House,
    body: ChatBody,
    prompt: tuple[int, ...],
    adapter: str,
    tenant: str,
    constraint: MakesConstraint | None,
) -> Request:
    asked = body.max_completion_tokens or body.max_tokens
    return Request(
        prompt=prompt,
        max_tokens=asked or house.room(len(prompt)),
        sampling=body.sampling,
        stop_tokens=house.stop_tokens(body.ignore_eos),
        stop=tuple(body.stop or ()),
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        adapter=adapter,
        priority=body.priority,
        deadline_s=body.deadline_s(house.terms.timeout_s),
        tenant=tenant,
        constraint=constraint,
    )


class ChatForm(Form):
    """Messages whole, deltas of them in pieces."""

    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, house: House, body: ChatBody, toolbox: Toolbox) -> None:
        self.house, self.body, self.toolbox, self.spelling = house, body, toolbox, Spelling(house.tokenizer)
        self._readers: dict[int, Any] = {}

    def choice(self, said: Said) -> dict[str, Any]:
        content, calls = self.toolbox.read(said.text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": said.number,
            "message": message,
            "logprobs": self._logprobs(said.logprobs),
            "finish_reason": self._finish(said.finish, bool(calls)),
        }

    def pieces(self, said: Said, event: Event) -> list[dict[str, Any]]:
        reader = self._readers.setdefault(said.number, self.toolbox.reader())
        text, calls = reader.push(event.text, bool(event.finish))
        pieces = [] if said.begun else [self._piece(said, {"role": "assistant", "content": ""})]
        if text or event.logprobs:
            pieces.append(self._piece(said, {"content": text}, self._logprobs(event.logprobs)))
        if calls:
            deltas = [{"index": index, **call} for index, call in enumerate(calls)]
            pieces.append(self._piece(said, {"tool_calls": deltas}))
        if event.finish:
            finish = self._finish(event.finish, bool(calls))
            pieces.append(self._piece(said, {}) | {"finish_reason": finish})
        return pieces

    def _piece(self, said: Said, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": said.number, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _finish(self, finish: str, called: bool) -> str | None:
        return "tool_calls" if called and finish == "stop" else FINISH[finish]

    def _logprobs(self, noted: list[Logprob] | tuple[Logprob, ...]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": [self._noted(one) for one in noted], "refusal": None}

    def _noted(self, one: Logprob) -> dict[str, Any]:
        return {
            **self._spelt(one.token, one.logprob),
            "top_logprobs": [self._spelt(token, value) for token, value in one.top],
        }

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.spelling.bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}
