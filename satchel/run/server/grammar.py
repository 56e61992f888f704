"""Answers that follow a JSON schema, through llguidance: which tokens may come next, in every state of the grammar.

A schema is compiled before its request is accepted, within llguidance's limits and away from the event loop: one that
cannot be compiled is an error, and none is dropped in silence. White space is fixed (`", "` and `": "`), so that no
answer runs away in blanks.
"""

from __future__ import annotations

import asyncio
import json
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from satchel.core.request import Constraint, MakesConstraint
from satchel.model.tokenizer import Tokenizer
from satchel.run.server.faults import Fault
from satchel.run.server.spelling import Spelling
from satchel.run.server.tools import CLOSE, OPEN, Toolbox
from satchel.run.server.wire import ResponseFormat

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """Compiles schemas for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary

    @classmethod
    def ready(cls, tokenizer: Tokenizer, vocabulary: int) -> Grammar:
        """With the table of the vocabulary made, and one schema compiled: all that schemas share of memory is spent."""
        grammar = cls(tokenizer, vocabulary)
        grammar._compile(_grammar({"type": "object"}), "")().allowed()
        return grammar

    async def constraint(self, wanted: ResponseFormat | None) -> MakesConstraint | None:
        """What a `response_format` asks for. Raises Fault for a schema that cannot be followed."""
        if wanted is None or wanted.type == "text":
            return None
        schema = wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}
        return await asyncio.to_thread(self._compile, _grammar(schema), "response_format.json_schema.schema")

    async def calls(self, toolbox: Toolbox) -> MakesConstraint | None:
        """One of the calls that `tool_choice` asks for, as the model writes them."""
        if not (schemas := toolbox.forced):
            return None
        schema = json.dumps({"anyOf": schemas, "x-guidance": SPACING})
        around = (f'"{OPEN}\\n" ', f' "\\n{CLOSE}"') if toolbox.tagged else ("", "")
        lark = f"start: {around[0]}call{around[1]}\ncall: %json {schema}"
        return await asyncio.to_thread(self._compile, LLMatcher.grammar_from_lark(lark), "tools")

    def _compile(self, grammar: str, param: str) -> MakesConstraint:
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0][:300]
            raise Fault(400, f"this schema cannot be followed: {reason}", param=param)
        return _Made(matcher)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self.tokenizer, self.vocabulary)))


class _Made:
    """Makes the constraint of each answer: a copy of the compiled start."""

    def __init__(self, start: LLMatcher) -> None:
        self.start = start

    def __call__(self) -> Constraint:
        return _Following(self.start.deep_copy())


class _Following:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def allowed(self) -> list[int] | None:
        if self.matcher.is_stopped():
            return []
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()

    def advance(self, token: int) -> None:
        self.matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance reads one: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        spelling, added = Spelling(tokenizer), tokenizer.backend.get_added_tokens_decoder()
        self.tokenizer = tokenizer
        self.tokens = [spelling.bytes_of(token) for token in range(vocabulary)]
        self.special_token_ids = [token for token, content in added.items() if content.special]
        self.eos_token_id = next(iter(tokenizer.stop_ids), vocabulary - 1)
        self.bos_token_id = tokenizer.bos_id

    def __call__(self, text: bytes | str) -> list[int]:
        return self.tokenizer.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPACING)  # type: ignore[arg-type]
