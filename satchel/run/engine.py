"""The engine: many requests through one model, step by step. No threads, no network, no clock but the one given.

    engine = Engine(model, Limits(blocks=500), tokenizer)
    id = engine.submit(Request(prompt=(1, 2, 3), max_tokens=16))
    while not engine.idle:
        for event in engine.step(): ...

One step: schedule, propose, forward, accept, publish. An answer depends on its request alone: not on what else runs, on
what the pool remembers, on how its prompt was cut, nor on whether it was preempted; up to the rounding of matrix
products, which may differ in the last bits with the number of rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from satchel.core.book import make
from satchel.core.errors import UnknownName, UserError
from satchel.core.request import Event, Logprob, Request
from satchel.model.bank import Span
from satchel.model.decoder import Decoder
from satchel.model.paged import PAGE, Pool
from satchel.model.sampling import History, allow, choose, logprob_of, mix
from satchel.run.adapters import Adapter, Adapters
from satchel.run.answers import Answers
from satchel.run.blocks import Blocks
from satchel.run.forward import HEAD_ROWS, Part, groups, hidden, logits
from satchel.run.scheduler import Limits, Scheduler, Turn
from satchel.run.sequence import Sequence
from satchel.run.text import StopTexts, TextStream

if TYPE_CHECKING:
    from satchel.model.tokenizer import Tokenizer

# N tokens of a step, R rows of logits, V vocabulary

COUNTS = ("requests", "steps", "tokens", "answered", "reused", "guessed", "right")  # sums since the start
BROKEN = "the model's logits are no numbers; its weights or this prompt's values overflow the dtype"


class Engine:
    """Serves one model. Not safe for threads: all calls come from one at a time."""

    def __init__(
        self,
        model: Decoder,
        limits: Limits,
        tokenizer: Tokenizer | None = None,
        *,
        admission: str = "fcfs",
        decoding: str = "plain",
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The pool is allocated here. Without a `tokenizer`, events have no text and stop texts are refused."""
        self.model, self.limits, self.tokenizer, self.seed, self.clock = model.eval(), limits, tokenizer, seed, clock
        weight = model.model.embed_tokens.weight
        self.pool = Pool(model.config, limits.blocks, weight.dtype, weight.device, limits.context)
        blocks, copy = Blocks(limits.blocks, PAGE), self.pool.copy
        self.scheduler = Scheduler(limits, blocks, make("admission", admission), clock, copy)
        self.proposer = make("decoding", decoding).start(model)
        self.answers = Answers()
        self.adapters: Adapters | None = None  # from the first one on
        self.siblings: dict[int, list[Sequence]] = {}  # by request, answers that begin when the prompt was seen
        self.counts: Counter[str] = Counter()
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.answers.open

    def submit(self, request: Request) -> int:
        """Takes a request; its id, by which its events are known. Raises UserError for one that can never run."""
        self._check(request)
        id, self._next_id = self._next_id, self._next_id + 1
        first, *others = (self._sequence(id, index, request) for index in range(request.answers))
        self.answers.begin(id, request)
        self.siblings[id] = others
        self.scheduler.add(first)
        self.counts["requests"] += 1
        return id

    def cancel(self, id: int) -> list[Event]:
        """Ends a request now; what is left to say of it. Nothing for one that has ended or never was."""
        return [event for s in self._under_way() if s.id == id for event in self._end(s, "cancelled")]

    def step(self) -> list[Event]:
        """Runs the model once for whatever is most urgent, and says what came of it."""
        now = self.clock()
        events = [event for s in self._under_way() if s.deadline_s <= now for event in self._end(s, "deadline")]
        turn = self.scheduler.next()
        events += [event for s, error in turn.failed.items() for event in self._end(s, "error", error)]
        if not turn.work:
            return events
        sequences = sorted(turn.work, key=lambda s: s.root)  # those of one adapter stand together
        parts = self._parts(turn, sequences, self._propose(turn))
        with self._adapted(sequences, parts):
            x_ND = hidden(self.model, self.pool, parts)
        self.counts.update(steps=1, tokens=sum(part.fed for part in parts))
        return events + self._accept(sequences, parts, x_ND)

    def register(self, name: str, folder: str | Path) -> None:
        """Make an adapter known, for requests to ask for it. Raises UserError for a name that is taken, ModelError for
        a folder that holds no adapter of this model; nothing has changed then."""
        if self.adapters is None:
            self.adapters = self.scheduler.adapters = Adapters(self.model, self.pool)
        self.adapters.register(name, folder)

    def unregister(self, name: str) -> None:
        """Forget an adapter's name; answers that are under way keep it. Raises UnknownName."""
        if self.adapters is None:
            raise UnknownName("adapter", name, ())
        self.adapters.remove(name)

    def run(self) -> list[Event]:
        """Steps until idle: all events."""
        events = []
        while not self.idle:
            events += self.step()
        return events

    def stats(self) -> dict[str, int]:
        """Figures of now, and sums since the start: docs/STRUCTURE.md says what they are."""
        blocks = self.scheduler.blocks
        return {
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "blocks": blocks.count,
            "blocks_held": blocks.held,
            "blocks_idle": len(blocks.idle),
            "block_bytes": self.pool.block_bytes,
            "preemptions": self.scheduler.preemptions,
            "adapters": len(self.adapters.registered) if self.adapters else 0,
            "adapters_resident": len(self.adapters.resident) if self.adapters else 0,
            "adapter_loads": self.adapters.loads if self.adapters else 0,
            **{name: self.counts[name] for name in COUNTS},
        }

    def check_integrity(self) -> None:
        """Raises SatchelError where pool, tables and requests contradict each other; for tests, and when idle."""
        self.scheduler.check_integrity()
        self.answers.check_integrity([*self._under_way(), *(s for some in self.siblings.values() for s in some)])

    def _check(self, request: Request) -> None:
        total, vocabulary = len(request.prompt) + request.max_tokens, self.model.config.vocab
        if total > self.limits.context:
            raise UserError(
                f"{len(request.prompt)} tokens of prompt and max_tokens={request.max_tokens} make {total}; "
                f"this engine takes {self.limits.context} together"
            )
        adapter = self._adapter(request)
        left = self.limits.blocks - (adapter.blocks if adapter else 0)
        if (needs := self.scheduler.blocks.needed(total)) > left:
            beside = f" beside adapter '{adapter.name}'" if adapter else ""
            raise UserError(
                f"{total} tokens need {needs} blocks of {PAGE} and the pool has {left}{beside}; "
                f"ask for {left * PAGE} tokens or less, or give the engine more memory"
            )
        for name, tokens in (("prompt", request.prompt), ("logit_bias", request.sampling.logit_bias)):
            if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
                raise UserError(f"{name}: token {wrong[0]} is not among the model's {vocabulary}")
        if request.stop and self.tokenizer is None:
            raise UserError("stop: this engine has no tokenizer, so it knows no text; give stop_tokens")

    def _sequence(self, id: int, index: int, request: Request) -> Sequence:
        seed = mix(self.seed, id) if request.sampling.seed is None else request.sampling.seed
        return Sequence(
            id=id,
            index=index,
            request=request,
            key=mix(seed, index),
            arrival_s=self.clock(),
            tokens=list(request.prompt),
            adapter=self._adapter(request),
            stream=TextStream(self.tokenizer) if self.tokenizer else None,
            stops=StopTexts(request.stop) if request.stop else None,
            constraint=request.constraint() if request.constraint else None,
        )

    def _adapter(self, request: Request) -> Adapter | None:
        if not request.adapter:
            return None
        if self.adapters is None:
            raise UnknownName("adapter", request.adapter, ())
        return self.adapters.find(request.adapter)

    def _under_way(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def _propose(self, turn: Turn) -> dict[Sequence, list[int]]:
        """Guesses for answers that grow token by token, as far as the step and the pool have room."""
        asking = [s for s in turn.work if s.pending == 1 and s.said_count and s.constraint is None]
        share = (self.limits.step_tokens - turn.tokens) // max(len(asking), 1)
        room = [min(share, s.request.max_tokens - s.said_count - 1, HEAD_ROWS - 1) for s in asking]
        drafts = zip(asking, self.proposer.propose(asking, room), strict=True)
        return {s: list(draft[: self.scheduler.extend(s, len(draft))]) for s, draft in drafts if draft}

    def _parts(self, turn: Turn, sequences: list[Sequence], drafts: dict[Sequence, list[int]]) -> list[Part]:
        parts, first = [], 0
        for s in sequences:
            tokens = s.tokens[s.cached : s.cached + turn.work[s]]
            parts.append(Part(tokens, drafts.get(s, []), s.table, s.cached, first))
            first += parts[-1].fed
        return parts

    def _adapted(self, sequences: list[Sequence], parts: list[Part]) -> AbstractContextManager[None]:
        """The adapters of a step's tokens, in force."""
        if self.adapters is None:
            return nullcontext()
        bounds: dict[Adapter, tuple[int, int]] = {}
        for s, part in zip(sequences, parts, strict=True):
            if s.adapter is not None:
                first, _ = bounds.get(s.adapter, (part.first, 0))
                bounds[s.adapter] = first, part.first + part.fed
        resident = self.adapters.resident
        return self.adapters.bank.using([Span(*bound, resident[a].stored) for a, bound in bounds.items()])

    def _accept(self, sequences: list[Sequence], parts: list[Part], x_ND: Tensor) -> list[Event]:
        """Choose tokens where the model has seen all of a sequence, and say them."""
        events, complete = [], []
        for number, (s, part) in enumerate(zip(sequences, parts, strict=True)):
            if s.request.prompt_logprobs and not s.said_count:
                self._note_prompt(s, part, x_ND)
            if len(part.tokens) == s.pending:
                complete.append((number, part))
            else:
                self.scheduler.seen(s, s.cached + len(part.tokens))
        for group in groups(complete):  # the logits of one die before those of the next are made
            events += self._answer_some([(sequences[number], part) for number, part in group], x_ND)
        return events

    def _answer_some(self, group: list[tuple[Sequence, Part]], x_ND: Tensor) -> list[Event]:
        logits_RV = logits(self.model, x_ND[[row for _, part in group for row in part.rows]])
        split = logits_RV.split([len(part.rows) for _, part in group])
        told = [self._answer(s, part.draft, mine_RV) for (s, part), mine_RV in zip(group, split, strict=True)]
        return [event for events in told for event in events]

    def _answer(self, s: Sequence, draft: Items[int], logits_RV: Tensor) -> list[Event]:
        """What the logits after all its tokens make of a sequence, and of answers that begin with the same prompt."""
        if not bool(logits_RV.amax(1).isfinite().all()):
            return self._end(s, "error", BROKEN)
        siblings = self.siblings.pop(s.id, [])
        for sibling in siblings:
            self.scheduler.fork(s, sibling)
        return [event for one in (s, *siblings) for event in self._say(one, draft, logits_RV)]

    def _say(self, s: Sequence, draft: Items[int], logits_RV: Tensor) -> list[Event]:
        """Guesses, as long as they are what would have been chosen, and one token more."""
        begin, text, logprobs = len(s.tokens), "", []
        for logits_V, guess in zip(logits_RV, [*draft, None], strict=True):
            token = self._choose(s, logits_V)
            if token is None:
                text += s.end("stop")
                break
            text += s.append(token)
            logprobs += self._logprob(s, token, logits_V)
            if s.finish or token != guess:
                break
        said = s.tokens[begin:]
        right = sum(token == guess for token, guess in zip(said, draft, strict=False))
        self.counts.update(answered=len(said), guessed=len(draft), right=right)
        self.scheduler.seen(s, len(s.tokens) - 1)
        if draft:
            self.proposer.learn(s, len(draft), right)
        if s.finish:
            self._drop(s)
        return self.answers.say(s, said, text, logprobs)

    def _choose(self, s: Sequence, logits_V: Tensor) -> int | None:
        """The next token; None if the constraint leaves none."""
        allowed = s.constraint.allowed() if s.constraint is not None else None
        if allowed is not None:
            if not allowed:
                return None
            logits_V = allow(logits_V, allowed)
        how = s.request.sampling
        history = History(s.request.prompt, s.said) if how.penalises else History()
        return choose(logits_V, how, mix(s.key, len(s.tokens)), history)

    def _logprob(self, s: Sequence, token: int, logits_V: Tensor) -> list[Logprob]:
        if s.request.logprobs is None and s.request.answers == s.request.n:
            return []
        found = logprob_of(logits_V, token, s.request.logprobs or 0)
        s.logprob += found.logprob
        return [] if s.request.logprobs is None else [found]

    def _note_prompt(self, s: Sequence, part: Part, x_ND: Tensor) -> None:
        """Logarithms of the prompt's tokens that follow those of this part."""
        s.prompt_logprobs = s.prompt_logprobs or [None]
        stop = min(part.past + len(part.tokens) + 1, len(s.request.prompt))
        missing = range(max(part.past + 1, len(s.prompt_logprobs)), stop)
        for start in range(missing.start, missing.stop, HEAD_ROWS):
            some = range(start, min(start + HEAD_ROWS, missing.stop))
            x_RD = x_ND[[part.first + at - 1 - part.past for at in some]]
            s.prompt_logprobs += self._logprobs([s.tokens[at] for at in some], x_RD, s.request.logprobs or 0)

    def _logprobs(self, tokens: list[int], x_RD: Tensor, top: int) -> list[Logprob]:
        return [logprob_of(row_V, t, top) for t, row_V in zip(tokens, logits(self.model, x_RD), strict=True)]

    def _end(self, s: Sequence, finish: str, error: str = "") -> list[Event]:
        """Ends an answer before its time, and those that would have begun with it."""
        events = []
        for one in (s, *self.siblings.pop(s.id, [])):
            text = one.end(finish)
            self._drop(one)
            events += self.answers.say(one, (), text, (), error)
        return events

    def _drop(self, s: Sequence) -> None:
        self.counts["reused"] += s.reused
        self.scheduler.remove(s)
        self.proposer.forget(s)
