"""Text from tokens while they are made: whole characters only, and nothing that may turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from satchel.model.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what the bytes of an unfinished character decode to


class TextStream:
    """Text from tokens, as early as it is certain: a character that spans tokens comes out once, and whole.

    Decoding the last two pieces together keeps what a decoder does between tokens, such as spaces; the pieces that
    came out always add up to the text of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = self.done = 0  # ids[start:done] are out, and give what follows its context

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty."""
        self.ids.append(token)
        fresh = self._fresh()
        if not fresh or fresh.endswith(BROKEN):
            return ""
        self.start, self.done = self.done, len(self.ids)
        return fresh

    def rest(self) -> str:
        """What is still held back, at the end."""
        return self._fresh()

    def _fresh(self) -> str:
        said = self._decode(self.ids[self.start : self.done])
        return self._decode(self.ids[self.start :])[len(said) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=True)


class StopTexts:
    """Lets text through up to the first of some stop texts, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.met: str | None = None  # the stop text that came
        self._held = ""

    def push(self, text: str) -> str:
        """What is certain to come before any stop text; nothing more once one was met."""
        if self.met is not None:
            return ""
        self._held += text
        found = [(at, stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.met = min(found)
            out, self._held = self._held[:at], ""
            return out
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def rest(self) -> str:
        """What was held back, at the end."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that begins the stop text."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
