"""The engine: many requests through one model, step by step. No threads, no network, no clock but the one given.

    engine = Engine(model, Limits(blocks=500), tokenizer)
    id = engine.submit(Request(prompt=(1, 2, 3), max_tokens=16))
    while not engine.idle:
        for event in engine.step(): ...

One step: schedule, propose, forward, accept, publish. An answer depends on its request alone, unless the decoding
says otherwise: not on what else runs, on what the pool remembers, on how its prompt was cut, nor on whether it was
preempted; up to the rounding of matrix products, which may differ in the last bits with the number of rows.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from satchel.core.book import make
from satchel.core.request import Event, Request
from satchel.core.serve_seams import Draft
from satchel.model.decoder import Decoder
from satchel.model.forward import Part, chosen, groups, logits
from satchel.model.paged import PAGE, Pages, Pool
from satchel.model.sampling import sound
from satchel.run.adapters import Adapters
from satchel.run.answers import Answers
from satchel.run.blocks import Blocks
from satchel.run.choice import add_states, mean_state, next_token, rate_prompt, rated
from satchel.run.graphs import Eager
from satchel.run.intake import begin, check
from satchel.run.scheduler import Limits, Scheduler, Turn
from satchel.run.sequence import Sequence

if TYPE_CHECKING:
    from satchel.model.tokenizer import Tokenizer

# N tokens of a step, R rows of logits, V vocabulary

COUNTS = ("requests", "steps", "tokens", "answered", "reused", "drafts", "guessed", "right")  # sums since the start
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
        preemption: str = "recompute",
        decoding: str = "plain",
        skip: str = "none",
        kv: str = "none",
        seed: int = 0,
        runner: Callable[[Decoder, Pages], Eager] = Eager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The pool is allocated here. Without a `tokenizer`, events have no text and stop texts are refused."""
        self.model, self.limits, self.tokenizer, self.seed, self.clock = model.eval(), limits, tokenizer, seed, clock
        how = make("decoding", decoding)
        beside = second.source.config if (second := how.beside()) else None
        self.pool = Pool(model.config, limits.blocks, model.dtype, model.device, limits.context, beside, kv)
        self.shelf = make("preemption", preemption).start(self.pool.data)
        blocks = Blocks(limits.blocks, PAGE, self.shelf)
        self.adapters = Adapters(model, self.pool)
        self.scheduler = Scheduler(limits, blocks, make("admission", admission), self.adapters, clock, self.pool.copy)
        self.runner = runner(model, self.pool.pages)
        self.proposer = how.start(model, self.pool.beside, tokenizer)
        skipping = make("skip", skip)
        self.skipper = skipping.start(model, tokenizer) if skipping else None
        self.answers = Answers()
        self.siblings: dict[int, list[Sequence]] = {}  # by request, answers that begin when the prompt was seen
        self.counts: Counter[str] = Counter()
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.answers.open

    def submit(self, request: Request) -> int:
        """Takes a request; its id, by which its events are known. Raises UserError for one that can never run."""
        adapter = self.adapters.find(request.adapter) if request.adapter else None
        check(request, self.limits, self.model.config.vocab, adapter, self.tokenizer is not None)
        id = self._next_id
        first, *others = begin(id, request, self.seed, self.clock(), adapter, self.tokenizer)
        self._next_id += 1
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
        with self.adapters.using((s.adapter, part.all_rows) for s, part in zip(sequences, parts, strict=True)):
            x_ND = self.runner.hidden(parts, self.skipper)
        self.counts["steps"] += 1
        self.counts["tokens"] += sum(part.fed for part in parts)
        return events + self._accept(sequences, parts, x_ND)

    def register(self, name: str, folder: str | Path) -> None:
        """Make an adapter known, for requests to ask for it. Raises UserError for a name that is taken, ModelError for
        a folder that holds no adapter of this model; nothing has changed then."""
        self.adapters.register(name, folder)

    def unregister(self, name: str) -> None:
        """Forget an adapter's name; answers that are under way keep it. Raises UnknownName."""
        self.adapters.remove(name)

    def warm(self) -> None:
        """Prepare for steps of all sizes, if there is anything to prepare: before requests come."""
        self.runner.warm(self.limits.batch, self.proposer.most)

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
            "moved_out": self.shelf.moved_out,
            "moved_in": self.shelf.moved_in,
            "copies": self.shelf.copies,
            "adapters": len(self.adapters.registered),
            "adapters_resident": len(self.adapters.resident),
            "adapter_loads": self.adapters.loads,
            "replayed": self.runner.replayed,
            "skipped": self.skipper.skipped if self.skipper else 0,
            **{name: self.counts[name] for name in COUNTS},
        }

    def check_integrity(self) -> None:
        """Raises SatchelError where pool, tables and requests contradict each other; for tests, and when idle."""
        self.scheduler.check_integrity()
        self.answers.check_integrity([*self._under_way(), *(s for some in self.siblings.values() for s in some)])

    def _under_way(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def _propose(self, turn: Turn) -> dict[Sequence, Draft]:
        """Guesses for answers that grow token by token, as far as the step and the pool have room."""
        asking = [s for s in turn.work if s.pending == 1 and s.said_count and s.constraint is None]
        share = min((self.limits.step_tokens - turn.tokens) // max(len(asking), 1), self.proposer.most)
        left = {s: s.request.max_tokens - s.said_count - 1 for s in asking}  # tokens after the next one
        most = {s: min(share, self.proposer.width * left[s]) for s in asking}
        room = [self.scheduler.extend(s, most[s]) if s in most else 0 for s in turn.work]
        drafts = self.proposer.propose(list(turn.work), room, list(turn.work.values()))
        for s, draft in zip(turn.work, drafts, strict=True):
            self.scheduler.trim(s, len(draft))
        return dict(zip(turn.work, drafts, strict=True))

    def _parts(self, turn: Turn, sequences: list[Sequence], drafts: dict[Sequence, Draft]) -> list[Part]:
        parts, first = [], 0
        for s in sequences:
            tokens = s.tokens[s.cached : s.cached + turn.work[s]]
            parts.append(Part(tokens, drafts[s], s.table, s.cached, first, s.cached - len(s.request.prompt)))
            first += parts[-1].fed
        return parts

    def _accept(self, sequences: list[Sequence], parts: list[Part], x_ND: Tensor) -> list[Event]:
        """Choose tokens where the model has seen all of a sequence, and say them."""
        events, complete = [], []
        for number, (s, part) in enumerate(zip(sequences, parts, strict=True)):
            if s.request.prompt_logprobs and not s.said_count:
                rate_prompt(s, part, self.model, x_ND)
            if s.request.embed:
                events += self._embed(s, part, x_ND)
            elif len(part.tokens) == s.pending:
                complete.append((number, part))
            else:
                self.scheduler.seen(s, s.cached + len(part.tokens))
        for group in groups(complete, lambda numbered: len(numbered[1].rows)):  # one's logits die before the next's
            events += self._answer_some([(sequences[number], part) for number, part in group], x_ND)
        return events

    def _embed(self, s: Sequence, part: Part, x_ND: Tensor) -> list[Event]:
        """Sums up the states of a prompt; at its end their mean is all that is said."""
        add_states(s, part, x_ND)
        if len(part.tokens) < s.pending:
            self.scheduler.seen(s, s.cached + len(part.tokens))
            return []
        s.embedding = mean_state(s)
        if not all(map(math.isfinite, s.embedding)):
            return self._end(s, "error", BROKEN)
        return self._end(s, "stop")

    def _answer_some(self, group: list[tuple[Sequence, Part]], x_ND: Tensor) -> list[Event]:
        logits_RV, events, first = logits(self.model, chosen(x_ND, [r for _, part in group for r in part.rows])), [], 0
        good_R = sound(logits_RV)
        for s, part in group:
            mine = slice(first, first := first + len(part.rows))
            if all(good_R[mine]):
                events += self._answer(s, part.draft, logits_RV[mine])
            else:
                events += self._end(s, "error", BROKEN)
        return events

    def _answer(self, s: Sequence, draft: Draft, logits_RV: Tensor) -> list[Event]:
        """What the logits after all its tokens make of a sequence, and of answers that begin with the same prompt."""
        siblings = self.siblings.pop(s.id, [])
        for sibling in siblings:
            self.scheduler.fork(s, sibling)
        return [event for one in (s, *siblings) for event in self._say(one, draft, logits_RV)]

    def _say(self, s: Sequence, draft: Draft, logits_RV: Tensor) -> list[Event]:
        """The guesses along one path, as long as they are what comes, and one token more."""
        begin, text, logprobs, path, at = len(s.tokens), "", [], [], -1
        while at is not None and not s.finish:
            logits_V = logits_RV[at + 1]
            token = self._next(s, at, logits_V)
            if token is None:
                text += s.end("stop")
                break
            text += s.append(token)
            logprobs += rated(s, token, logits_V)
            if (at := draft.child(at, token)) is not None:
                path.append(at)
        said = s.tokens[begin:]
        self.pool.gather(s.table, begin, path)
        self.counts["answered"] += len(said)
        self.scheduler.seen(s, len(s.tokens) - 1)
        if draft:
            self._learn(s, draft, path)
        if s.finish:
            self._drop(s)
        return self.answers.say(s, said, text, logprobs)

    def _learn(self, s: Sequence, draft: Draft, path: list[int]) -> None:
        """Guesses, and which of them were right."""
        for name, more in (("drafts", 1), ("guessed", len(draft)), ("right", len(path))):
            self.counts[name] += more
        s.guessed, s.right = s.guessed + len(draft), s.right + len(path)
        self.proposer.learn(s, draft, path)

    def _next(self, s: Sequence, at: int, logits_V: Tensor) -> int | None:
        """The token after guess `at`; None if the constraint leaves none."""
        token = self.proposer.accept(s, at, logits_V)
        return next_token(s, logits_V) if token is None else token

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
