"""API keys with quotas, from a TOML file: one table a client.

    [alice]
    key = "sk-alice-..."
    requests_per_minute = 60      # 0 or left out: any number
    tokens_per_minute = 100000    # of prompts and answers together

A quota is a bucket that holds a minute's worth and fills evenly. Tokens are taken when an answer has ended, since
nobody knows them before: a bucket may go below zero, and then has to fill up first.
"""

from __future__ import annotations

import hashlib
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from satchel.core.errors import UnknownName, UserError
from satchel.run.server.faults import Fault, overloaded

FIELDS = {"key": str, "requests_per_minute": int, "tokens_per_minute": int}
Clock = Callable[[], float]


@dataclass
class Bucket:
    """So many a minute; 0: any number."""

    per_minute: int
    clock: Clock
    level: float = 0.0
    filled_s: float = 0.0

    def __post_init__(self) -> None:
        self.level, self.filled_s = float(self.per_minute), self.clock()

    def wait_s(self, count: float) -> float:
        """Seconds until the bucket holds `count`, or as much as it can; 0 if it does."""
        if not self.per_minute:
            return 0.0
        now = self.clock()
        self.level = min(self.level + (now - self.filled_s) * self.per_minute / 60, self.per_minute)
        self.filled_s = now
        return max(min(count, self.per_minute) - self.level, 0.0) * 60 / self.per_minute

    def take(self, count: float) -> None:
        """`count` less."""
        self.level -= count


@dataclass
class Client:
    """Who holds a key, and what is left of the quotas."""

    name: str
    requests: Bucket
    tokens: Bucket

    def begin(self) -> None:
        """One request more. Raises Fault if a quota is spent."""
        for bucket, unit in ((self.requests, "requests"), (self.tokens, "tokens")):
            if wait_s := bucket.wait_s(1):
                raise overloaded(f"the quota of {bucket.per_minute} {unit} a minute is spent", wait_s)
        self.requests.take(1)

    def end(self, tokens: int) -> None:
        """An answer and its prompt had so many tokens."""
        self.tokens.take(tokens)


@dataclass
class Keys:
    """The clients by the digest of their key; without any, everybody is welcome."""

    clients: Mapping[bytes, Client] = field(default_factory=dict)
    clock: Clock = time.monotonic

    def client(self, authorization: str) -> Client:
        """Whose `Authorization` header this is. Raises Fault if it is nobody's."""
        if not self.clients:
            return Client("", Bucket(0, self.clock), Bucket(0, self.clock))
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "bearer" and (found := self.clients.get(_digest(key.strip()))):
            return found
        said = "this API key is not known" if authorization else "an API key is needed"
        raise Fault(
            401, f"{said}; send 'Authorization: Bearer KEY'", kind="authentication_error", code="invalid_api_key"
        )


def read_keys(path: str | Path, clock: Clock = time.monotonic) -> Keys:
    """The clients of a file. Raises UserError where it cannot be read or says something else."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as fault:
        raise UserError(f"{path}: cannot be read: {fault.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: is not TOML: {fault}") from None
    clients: dict[bytes, Client] = {}
    for name, table in tables.items():
        checked = _check(f"{path}: [{name}]", table)
        if (digest := _digest(checked["key"])) in clients:
            raise UserError(f"{path}: [{name}] has the key of [{clients[digest].name}]; every client has its own")
        buckets = [Bucket(checked.get(f"{unit}_per_minute", 0), clock) for unit in ("requests", "tokens")]
        clients[digest] = Client(name, *buckets)
    if not clients:
        raise UserError(f'{path}: holds no client; a client is a table such as [alice] with key = "..."')
    return Keys(clients, clock)


def _check(where: str, table: Any) -> dict[str, Any]:
    if not isinstance(table, dict) or not table.get("key"):
        raise UserError(f'{where} needs a line key = "..."')
    for name, value in table.items():
        if name not in FIELDS:
            raise UnknownName("key", name, FIELDS, where)
        if type(value) is not FIELDS[name] or (isinstance(value, int) and value < 0):
            raise UserError(f"{where}: {name} = {value!r} is not allowed; it is {_expected(FIELDS[name])}")
    return table


def _expected(kind: type) -> str:
    return "a text" if kind is str else "a whole number, 0 or above"


def _digest(key: str) -> bytes:
    """Keys are looked up by digest, so that the time of a look-up tells nothing of them."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
