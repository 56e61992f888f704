"""Clients of every kind, over sockets of their own: what each sends, how it behaves, and what it may be told.

A connection carries one request and is closed by the server, so that whatever comes after the one answer would be seen.
Raises Wrong where an answer is not what its request may be told: lost, cut, told twice, a failure of the server's own.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

STUCK_S = 180  # without a whole answer
BUSY = "429"
FINE = {200, 408, 429}  # 408: of those that gave a deadline
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SPOILT = (
    b"",
    b"{",
    b"[1]",
    b"null",
    b"\xff\xfe{}",
    b'{"prompt": 1}',
    b'{"promt": "x"}',
    b'{"prompt": "x", "n": 0}',
    b'{"prompt": "x", "max_tokens": 1e99}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "model": "nobody"}',
    b'{"prompt": [[1, 99999999]]}',
    b'{"prompt": ["x", 5]}',
    b'{"prompt": "x", "logit_bias": {"a": 1}}',
    b'{"prompt": "x", "response_format": {"type": "json_schema"}}',
    b"[" * 5000,
)

Kind = Callable[["Storm", random.Random], Coroutine[Any, Any, str]]


class Wrong(AssertionError):
    """The server did what it never may."""


@dataclass
class Storm:
    """What the clients share."""

    port: int
    adapters: list[str]
    longest: int  # tokens of prompt and answer together
    body_bytes: int = 1 << 20
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass
class Answer:
    """A whole answer."""

    status: int
    body: bytes


async def one(storm: Storm, rng: random.Random, kind: Kind | None = None) -> None:
    """A request of some kind, to its end."""
    kinds = {answered: 60, gives_up: 14, spoilt: 14, reads_slowly: 5, too_much: 3, cut_short: 3, moves_adapter: 1}
    kind = kind or rng.choices(list(kinds), list(kinds.values()))[0]
    try:
        async with asyncio.timeout(STUCK_S):
            told = await kind(storm, rng)
    except TimeoutError:
        raise Wrong(f"{kind.__name__}: no whole answer in {STUCK_S} s") from None
    storm.outcomes[f"{kind.__name__.replace('_', ' ')}: {told}"] += 1


async def answered(storm: Storm, rng: random.Random) -> str:
    """Waits for the whole of it, and for its turn if the server is full."""
    path, body = a_request(storm, rng)
    while (told := _checked(path, body, await _ask(storm, path, body))) == BUSY:
        storm.outcomes["told to come again"] += 1
        await asyncio.sleep(rng.uniform(0.1, 0.5))
    return told


async def reads_slowly(storm: Storm, rng: random.Random) -> str:
    """Takes what it is sent in small pieces, with pauses."""
    path, body = a_request(storm, rng)
    return _checked(path, body, await _ask(storm, path, body, pause_s=rng.uniform(0.001, 0.02)))


async def gives_up(storm: Storm, rng: random.Random) -> str:
    """Goes away after a while, perhaps in the middle of the answer."""
    path, body = a_request(storm, rng)
    try:
        async with asyncio.timeout(rng.choice([0.0, 0.02, 0.1, 0.5])):
            return _checked(path, body, await _ask(storm, path, body))
    except TimeoutError:
        return "went away"


async def spoilt(storm: Storm, rng: random.Random) -> str:
    """Sends what is no request."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/load_lora_adapter"])
    raw = rng.choice([*SPOILT, rng.randbytes(rng.randint(1, 2000))])
    answer = await _ask(storm, path, raw)
    _require(400 <= answer.status < 500, f"{raw[:80]!r} was answered by {answer.status}")
    _require(bool(json.loads(answer.body)["error"]["message"]), "an error without a message")
    return "refused"


async def too_much(storm: Storm, rng: random.Random) -> str:
    """Sends megabytes, as one prompt, as tokens, or as fields."""
    size = rng.choice([100_000, storm.body_bytes // 2, storm.body_bytes, storm.body_bytes + 1, 4 << 20])
    begin, piece, end = rng.choice(
        [(b'{"prompt":"', b"x", b'"}'), (b'{"prompt":[', b"1,", b"1]}"), (b"", b"[1],", b"")]
    )
    raw = begin + piece * (size // len(piece)) + end
    answer = await _ask(storm, "/v1/completions", raw)
    _require(answer.status in (400, 413, 429), f"{len(raw)} bytes were answered by {answer.status}")
    return str(answer.status)


async def cut_short(storm: Storm, rng: random.Random) -> str:
    """Goes away before its request is whole, or sends no HTTP at all."""
    reader, writer = await asyncio.open_connection("127.0.0.1", storm.port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"
    writer.write(
        rng.choice([head, head[:30], b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", rng.randbytes(200) + b"\r\n\r\n"])
    )
    await writer.drain()
    await asyncio.sleep(rng.random() * 0.1)
    writer.close()
    return "went away"


async def moves_adapter(storm: Storm, rng: random.Random) -> str:
    """Takes an adapter away and brings it back, whoever uses it meanwhile."""
    name = rng.choice(storm.adapters)
    gone = await _ask(storm, "/v1/unload_lora_adapter", {"lora_name": name})
    back = await _ask(storm, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": name})
    _require(gone.status in (200, 404) and back.status in (200, 400), f"{name}: {gone.status}, then {back.status}")
    return f"{gone.status}, {back.status}"


def a_request(storm: Storm, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request of any kind that the engine can run: its path and body."""
    kind = rng.random()
    if kind < 0.07:
        texts = ["e" * rng.randint(1, 200) for _ in range(rng.randint(1, 3))]
        return "/v1/embeddings", {"input": texts} | _model(storm, rng)
    room = rng.choice([40, 120, storm.longest - 40])
    prompt = rng.choice(["", "A beginning that many have. " * 4])[: room // 2]
    prompt += "".join(rng.choices("abcdefgh ", k=rng.randint(1, room // 2)))
    body = _model(storm, rng) | _how(rng)
    if kind < 0.25:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt[: room // 2]}]}
    if kind < 0.3:
        schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
        return "/v1/completions", body | {"prompt": prompt, "response_format": schema, "n": 1}
    more = {"logprobs": rng.choice([None, None, 0, 5]), "echo": rng.random() < 0.1}
    return "/v1/completions", body | {"prompt": prompt} | more


def _model(storm: Storm, rng: random.Random) -> dict[str, Any]:
    return {"model": rng.choice(storm.adapters)} if storm.adapters and rng.random() < 0.6 else {}


def _how(rng: random.Random) -> dict[str, Any]:
    how: dict[str, Any] = {
        "max_tokens": rng.choice([1, rng.randint(1, 40), rng.randint(1, 120)]),
        "n": rng.choice([1, 1, 1, 1, 2, 3]),
        "stream": rng.random() < 0.6,
        "temperature": rng.choice([0, 0.8]),
        "priority": rng.randint(-3, 3),
        "stop": rng.choice([None, "ab", ["x", "yz"]]),
    }
    if rng.random() < 0.1:
        how["deadline_ms"] = rng.randint(1, 3000)
    return how


async def _ask(storm: Storm, path: str, body: dict[str, Any] | bytes, pause_s: float = 0.0) -> Answer:
    """Sends a request and reads until the connection is closed. Raises Wrong for less or more than one answer."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: storm\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection(sock=await _connected(storm.port, 4096 if pause_s else 0))
    try:
        writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        sending = asyncio.create_task(_drained(writer))
        raw = bytearray()
        while piece := await _read(reader, 512 if pause_s else 1 << 16):
            raw += piece
            await asyncio.sleep(pause_s)
        sending.cancel()
        return _parsed(bytes(raw), path)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, size: int) -> bytes:
    try:
        return await reader.read(size)
    except ConnectionError:  # after a refusal of a body that was still being sent
        return b""


async def _drained(writer: asyncio.StreamWriter) -> None:
    try:
        await writer.drain()
    except ConnectionError:
        return


async def _connected(port: int, receive_buffer: int) -> socket.socket:
    raw = socket.socket()
    raw.setblocking(False)
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    return raw


def _parsed(raw: bytes, path: str) -> Answer:
    head, _, rest = raw.partition(b"\r\n\r\n")
    _require(head.startswith(b"HTTP/1.1 "), f"{path}: the connection was closed without an answer: {raw[:200]!r}")
    status = int(head[9:12])
    _require(status < 500, f"{path}: {status} {rest[:500]!r}")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    if headers.get(b"transfer-encoding") == b"chunked":
        return Answer(status, _unchunked(rest, path))
    _require(
        len(rest) == int(headers[b"content-length"]), f"{path}: {len(rest)} bytes of {headers[b'content-length']!r}"
    )
    return Answer(status, rest)


def _unchunked(rest: bytes, path: str) -> bytes:
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size or b"0", 16)
        if not count:
            _require(rest == b"\r\n", f"{path}: {rest[:80]!r} after the last piece")
            return bytes(body)
        body += rest[:count]
        rest = rest[count + 2 :]
    raise Wrong(f"{path}: the stream was cut: ...{bytes(body[-200:])!r}")


def _checked(path: str, body: dict[str, Any], answer: Answer) -> str:
    """Every choice is there and ends once; what is refused may be."""
    allowed = FINE if "deadline_ms" in body else FINE - {408}
    allowed = allowed | {404} if "model" in body else allowed  # somebody may have taken the adapter away
    _require(answer.status in allowed, f"{path} {json.dumps(body)[:300]}: {answer.status} {answer.body[:300]!r}")
    if answer.status != 200:
        _require(bool(json.loads(answer.body)["error"]["message"]), "an error without a message")
        return str(answer.status)
    if path == "/v1/embeddings":
        ends = [one["index"] for one in json.loads(answer.body)["data"]]
        wanted = len(body["input"])
    elif body.get("stream"):
        ends, wanted = _ends(answer.body), body["n"]
    else:
        choices = json.loads(answer.body)["choices"]
        ends = [choice["index"] for choice in choices if choice["finish_reason"]]
        wanted = body["n"]
    _require(sorted(ends) == list(range(wanted)), f"{path}: answers {ends} of {wanted} ended")
    return "whole"


def _ends(body: bytes) -> list[int]:
    lines = [line.removeprefix(b"data: ") for line in body.splitlines() if line]
    _require(bool(lines) and lines.pop() == b"[DONE]", f"the stream has no end: {body[-200:]!r}")
    pieces = [json.loads(line) for line in lines]
    _require(all("error" not in piece for piece in pieces), f"an error in the stream: {body[-400:]!r}")
    return [choice["index"] for piece in pieces for choice in piece["choices"] if choice["finish_reason"]]


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise Wrong(why)
