"""`/v1/completions`: text goes on. Prompts are texts or tokens, one or many; `echo` with `logprobs` scores a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from satchel.core.request import Event, Logprob, MakesConstraint, Request
from satchel.run.server.faults import Fault
from satchel.run.server.house import House
from satchel.run.server.replies import FINISH, Form, Reply, Said
from satchel.run.server.spelling import Spelling
from satchel.run.server.wire import CompletionBody

PROMPTS = 256  # in one body


async def complete(house: House, body: CompletionBody, tenant: str, request_id: str) -> Reply:
    """Submits the prompts of a body. Raises Fault or UserError for what cannot be answered."""
    adapter = house.adapter(body.model)
    house.admit(len(body.prompt))
    if len(body.prompt) > PROMPTS:
        raise Fault(400, f"{len(body.prompt)} prompts; one body has {PROMPTS} at most", param="prompt")
    prompts = [await tokens_of(house, prompt, "prompt") for prompt in body.prompt]
    constraint = await house.grammar.constraint(body.response_format)
    requests = [_request(house, body, prompt, adapter, tenant, constraint) for prompt in prompts]
    form = CompletionForm(house, body, requests)
    return Reply(house, form, await house.submit(requests), body.model or house.name, request_id)


async def tokens_of(house: House, prompt: str | list[int], param: str) -> tuple[int, ...]:
    """The token ids of a prompt, which may be these already. Raises Fault for an empty one that nothing can begin."""
    tokens = await house.encode(prompt, special=True) if isinstance(prompt, str) else tuple(prompt)
    if tokens:
        return tokens
    if house.tokenizer.bos_id is None:
        raise Fault(400, "the text is empty, and this model has no token to begin with", param=param)
    return (house.tokenizer.bos_id,)


def _request(
    house: House,
    body: CompletionBody,
    prompt: tuple[int, ...],
    adapter: str,
    tenant: str,
    constraint: MakesConstraint | None,
) -> Request:
    limit = house.room(len(prompt)) if body.max_tokens is None else max(body.max_tokens, 1)
    return Request(
        prompt=prompt,
        max_tokens=limit,
        sampling=body.sampling,
        stop_tokens=house.stop_tokens(body.ignore_eos),
        stop=tuple(body.stop or ()),
        n=body.n or 1,
        best_of=body.best_of or 0,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        adapter=adapter,
        priority=body.priority,
        deadline_s=body.deadline_s(house.terms.timeout_s),
        tenant=tenant,
        constraint=constraint,
    )


class CompletionForm(Form):
    """The old layout: text, and logarithms as parallel lists."""

    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def __init__(self, house: House, body: CompletionBody, requests: Sequence[Request]) -> None:
        self.spelling, self.body, self.requests, self.house = Spelling(house.tokenizer), body, requests, house

    def choice(self, said: Said) -> dict[str, Any]:
        silent = self.body.max_tokens == 0
        tokens = [] if silent else said.logprobs
        text = self._echoed(said) + ("" if silent else said.text)
        return self._row(said.number, text, self._logprobs([*said.prompt_logprobs, *tokens], said, 0), said.finish)

    def pieces(self, said: Said, event: Event) -> list[dict[str, Any]]:
        silent = self.body.max_tokens == 0
        echoed = "" if said.begun else self._echoed(said)
        text = echoed + ("" if silent else event.text)
        noted = [*event.prompt_logprobs, *(() if silent else event.logprobs)]
        if not (text or noted or event.finish):
            return []
        start = len(self._echoed(said) + said.text) if said.begun else 0
        return [self._row(said.number, text, self._logprobs(noted, said, start), event.finish)]

    def _echoed(self, said: Said) -> str:
        if not self.body.echo:
            return ""
        request = said.number // (self.body.n or 1)
        prompt = self.body.prompt[request]
        return prompt if isinstance(prompt, str) else self.house.tokenizer.decode(prompt)

    def _row(self, number: int, text: str, logprobs: dict[str, Any] | None, finish: str) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": FINISH[finish]}

    def _logprobs(self, noted: Iterable[Logprob | None], said: Said, start: int) -> dict[str, Any] | None:
        """Parallel lists over tokens; the first token of a prompt has no logarithm."""
        if self.body.logprobs is None:
            return None
        noted, spell = list(noted), self.spelling.text_of
        first = self.requests[said.number // (self.body.n or 1)].prompt[0]
        texts = [spell(first if one is None else one.token) for one in noted]
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else one.logprob for one in noted],
            "top_logprobs": [
                None if one is None else {spell(token): value for token, value in self.house.shown(one)}
                for one in noted
            ],
            "text_offset": list(accumulate(map(len, texts), initial=start))[: len(texts)],
        }
