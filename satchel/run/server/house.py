"""What every route works with: the engine's worker, the tokenizer, the names of models, the limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from satchel.core.errors import UnknownName, UserError, nearest
from satchel.core.request import Logprob, Request
from satchel.core.serve import Terms
from satchel.model.paged import PAGE
from satchel.model.tokenizer import Tokenizer
from satchel.run.memory import resident_bytes
from satchel.run.scheduler import Limits
from satchel.run.server.faults import Fault, overloaded, refused, unavailable
from satchel.run.server.grammar import Grammar
from satchel.run.server.metrics import Metrics
from satchel.run.server.weight import Weight
from satchel.run.server.worker import Stream, Worker

STALL_S = 120.0  # without a step, while requests are open, after which something is wrong
LONG_TEXT = 20_000  # characters; encoding more would hold up the event loop


@dataclass
class House:
    """One model that is served."""

    worker: Worker
    tokenizer: Tokenizer
    grammar: Grammar
    name: str  # of the model, as clients call it
    limits: Limits
    metrics: Metrics
    terms: Terms = field(default_factory=Terms)
    fixed: Mapping[str, int] = field(default_factory=dict)  # bytes beside the pool, by account
    budget_bytes: int | None = None
    adapters: Path | None = None  # folder from which clients may load more
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    weight: Weight = field(init=False)  # of what is open
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)  # one long text at a time

    def __post_init__(self) -> None:
        self.weight = Weight(self.terms.open_bytes)
        self.metrics.watch(lambda: self.worker.stats, self.accounts)

    @property
    def models(self) -> list[str]:
        """The names that a request may ask for: the model, then its adapters."""
        return [self.name, *list(self.worker.engine.adapters.registered)]

    def adapter(self, model: str | None) -> str:
        """The adapter that a `model` of a request stands for; empty for the bare model. Raises Fault for neither."""
        if model in (None, "", self.name):
            return ""
        if model in self.models:
            return model
        raise Fault(404, f"no model '{model}'; {nearest(model, self.models)}", param="model", code="model_not_found")

    async def load_adapter(self, name: str, path: str) -> None:
        """Register an adapter of the folder that the server was given. Raises Fault or UserError."""
        if self.adapters is None:
            raise Fault(403, "this server loads no adapters; start it with --adapters DIR", code="no_adapters")
        folder = (self.adapters / path).resolve()
        if not folder.is_relative_to(self.adapters.resolve()):
            raise Fault(403, f"adapters lie in {self.adapters}; name a folder there", param="lora_path")
        if name == self.name:
            raise Fault(400, f"'{name}' is the model's own name; choose another", param="lora_name")
        await self.worker.ask(lambda: self.worker.engine.register(name, folder))

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; answers under way keep it. Raises Fault for one that is not there."""
        try:
            await self.worker.ask(lambda: self.worker.engine.unregister(name))
        except UnknownName as error:  # it was never there, or somebody was faster
            raise refused(error, "lora_name") from None

    def admit(self, requests: int) -> None:
        """Raises Fault when no more requests can be taken now."""
        if self.draining:
            raise unavailable("the server is shutting down; ask another one", self.terms.drain_s)
        if not self.worker.alive:
            raise unavailable("the engine has stopped; see the server's log")
        if self.worker.open and self.worker.open + requests > self.terms.queue:
            wait_s = self.metrics.seconds_per_request() * (self.worker.open - self.limits.batch / 2)
            raise overloaded(
                f"{self.worker.open} requests are open, and this server takes {self.terms.queue} at once; come again",
                min(max(wait_s, 1.0), 60.0),
            )

    @property
    def healthy(self) -> bool:
        """Whether the engine works: it is there, and its last step is not long ago."""
        return self.worker.alive and (self.worker.idle or time.monotonic() - self.worker.stepped_s < STALL_S)

    def accounts(self) -> dict[str, int]:
        """Bytes that the budget holds now, by what they are for."""
        stats, each = self.worker.stats, self.worker.stats["block_bytes"]
        held, idle = stats["blocks_held"], stats["blocks_idle"]
        found = {**self.fixed, "kv held": held * each, "kv reusable": idle * each}
        found["kv free"] = (stats["blocks"] - held - idle) * each
        return found

    def snapshot(self) -> dict[str, Any]:
        """What the page shows."""
        return {
            "model": self.name,
            "models": self.models,
            "context": self.limits.context,
            "budget_bytes": self.budget_bytes,
            "memory": self.accounts(),
            "resident_bytes": resident_bytes(),
            "open": self.worker.open,
            "draining": self.draining,
            "checks": self.worker.checks,
            "time_s": time.monotonic(),
            **self.worker.stats,
        }

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Gives requests to the engine, all or none. Raises UserError for one that can never run, Fault for what would
        be too much beside what is open."""
        own_bytes = self.weight.take(requests)
        try:
            stream = await self.worker.submit(requests)
        except BaseException:
            self.weight.give_back(own_bytes)
            raise
        stream.on_close = lambda: self.weight.give_back(own_bytes)
        return stream

    async def encode(self, text: str, special: bool) -> tuple[int, ...]:
        """Token ids of a text, without holding up others for a long one. Raises UserError for one that is too long
        whatever its tokens are, before time and memory are spent on it."""
        if len(text) <= LONG_TEXT:
            return tuple(self.tokenizer.encode(text, special))
        if (least := len(text) // self.tokenizer.longest) > self.limits.context:
            raise UserError(f"{least} tokens of prompt at least; this engine takes {self.limits.context} together")
        async with self.encoding:
            return tuple(await asyncio.to_thread(self.tokenizer.encode, text, special))

    def room(self, prompt_tokens: int) -> int:
        """The longest answer to a prompt; at least 1, so that one that is too long is refused with its numbers."""
        from_pool = self.limits.blocks * PAGE
        return max(1, min(self.limits.context, from_pool) - prompt_tokens)

    def stop_tokens(self, ignored: bool) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return () if ignored else self.tokenizer.stop_ids

    def shown(self, logprob: Logprob) -> Sequence[tuple[int, float]]:
        """The alternatives to report, the token itself among them."""
        return (
            logprob.top
            if any(token == logprob.token for token, _ in logprob.top)
            else (
                *logprob.top,
                (logprob.token, logprob.logprob),
            )
        )
