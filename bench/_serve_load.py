"""Clients of an OpenAI server: raw sockets and as little work as can be, since they share the machine with it.

Every stream notes when each piece of text came. `figures` makes of these what the tables show.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench._harness import median


@dataclass
class Trace:
    """When one answer was asked for, and when each of its pieces came."""

    asked_s: float
    came_s: list[float] = field(default_factory=list)
    tokens: int = 0


async def stream(port: int, body: dict[str, Any]) -> Trace:
    """One request, streamed to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
    trace, last = Trace(time.monotonic()), b""
    writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        if not line:
            raise RuntimeError(f"the stream ended early: {last[:300]!r}")
        if line.startswith(b"data: "):
            last = line
            if b'"choices": []' not in line and b'"choices":[]' not in line:
                trace.came_s.append(time.monotonic())
    usage = json.loads(last[6:]).get("usage")  # a server that gives none sends a token a piece
    trace.tokens = usage["completion_tokens"] if usage else len(trace.came_s)
    writer.close()
    return trace


async def clients(port: int, bodies: Sequence[Sequence[dict[str, Any]]]) -> list[Trace]:
    """One client for each list of bodies, which it sends one after another; all start at once."""

    async def one(mine: Sequence[dict[str, Any]]) -> list[Trace]:
        return [await stream(port, body) for body in mine]

    return [trace for traces in await asyncio.gather(*map(one, bodies)) for trace in traces]


def figures(traces: Sequence[Trace], resident_bytes: int) -> dict[str, float]:
    """Medians over answers and pieces, and all tokens over the whole time."""
    gaps = sorted(after - before for t in traces for before, after in zip(t.came_s, t.came_s[1:], strict=False))
    took = max(t.came_s[-1] for t in traces) - min(t.asked_s for t in traces)
    return {
        "first token, ms": 1e3 * median(t.came_s[0] - t.asked_s for t in traces),
        "between tokens, ms": 1e3 * median(gaps),
        "p99, ms": 1e3 * gaps[min(int(0.99 * len(gaps)), len(gaps) - 1)],
        "tokens/s": sum(t.tokens for t in traces) / took,
        "resident, MiB": resident_bytes / (1 << 20),
    }
