"""What the open requests may take of the process's memory, beside the pool: a share of it that is set aside for them.

    bytes = (answers * prompt + (answers - 1) * max_tokens) * TOKEN  +  reported logarithms * LOGPROB   of each request

It is counted from a request's submission to the end of its reply, at the most that it may come to: the prompt, which
every answer has for itself, answers that ended before the last one, and the logarithms of tokens and their alternatives
until the reply is written. Of answers that run no more tokens exist than the pool has room for, which is little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from satchel.core.request import Request
from satchel.core.units import format_bytes
from satchel.run.server.faults import Fault, overloaded

TOKEN = 48  # bytes: a pointer and a number, and its text
LOGPROB = 120  # of one token that is reported with its logarithm
SEQUENCE = 4096  # an answer's own objects


@dataclass
class Weight:
    """The bytes of all open requests, within a limit."""

    limit_bytes: int
    held_bytes: int = 0

    def take(self, requests: Sequence[Request]) -> int:
        """Count these; how many bytes they are. Raises Fault where they are too many, or too many beside the others."""
        own = sum(map(weight, requests))
        if own > self.limit_bytes:
            raise Fault(
                400,
                f"prompts, answers and logprobs may take {format_bytes(own)} until they are sent, and this server "
                f"keeps {format_bytes(self.limit_bytes)} for all requests; lower max_tokens, n or logprobs, or ask for "
                "less at once",
                param="max_tokens",
            )
        if self.held_bytes + own > self.limit_bytes:
            raise overloaded("the open requests fill the memory that is kept for them; come again", 1.0)
        self.held_bytes += own
        return own

    def give_back(self, own_bytes: int) -> None:
        """A reply was written."""
        self.held_bytes -= own_bytes


def weight(request: Request) -> int:
    """Bytes that a request may come to."""
    told = request.max_tokens + len(request.prompt) * request.prompt_logprobs
    logprobs = 0 if request.logprobs is None else told * (1 + request.logprobs)
    each = SEQUENCE + len(request.prompt) * TOKEN + logprobs * LOGPROB
    return request.answers * each + (request.answers - 1) * request.max_tokens * TOKEN
