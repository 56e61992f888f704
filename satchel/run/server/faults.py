"""What a client hears of a mistake: OpenAI's error object, which names the field and the cure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from satchel.core.errors import UnknownName, UserError

UNION_TAGS = ("str", "list[", "function-", "constrained-", "literal[", "int", "float", "bool", "none")
SHOWN = 5  # problems of one body that are told


class Fault(Exception):
    """An answer that is an error: HTTP status and what OpenAI's clients read of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`; characters that are none are shown as escapes."""
        message = self.message.encode(errors="backslashreplace").decode()
        param = self.param and self.param.encode(errors="backslashreplace").decode()
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, in whole seconds."""
        return {} if self.retry_after_s is None else {"retry-after": str(max(1, round(self.retry_after_s)))}


def overloaded(why: str, retry_after_s: float) -> Fault:
    """Too much at once: 429."""
    return Fault(429, why, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s)


def unavailable(why: str, retry_after_s: float | None = None) -> Fault:
    """Nothing can be answered now: 503."""
    return Fault(503, why, kind="server_error", code="unavailable", retry_after_s=retry_after_s)


def broken(why: str) -> Fault:
    """Our own failure: 500."""
    return Fault(500, why, kind="server_error", code="internal_error")


def refused(error: UserError, param: str | None = None) -> Fault:
    """What the engine or the tokenizer will not take."""
    if isinstance(error, UnknownName) and error.kind == "adapter":  # somebody took it away after it was looked up
        return Fault(404, str(error), param=param or "model", code="model_not_found")
    code = "context_length_exceeded" if "this engine takes" in str(error) else None
    return Fault(400, str(error), param=param, code=code)


def malformed(problems: Iterable[Mapping[str, Any]]) -> Fault:
    """Every problem that pydantic found in a body, each with its path."""
    told: dict[str, str] = {}
    for problem in problems:
        where = () if problem["type"] == "json_invalid" else problem["loc"]
        told.setdefault(path_of(where), _sentence(problem))
    lines = [f"{path}: {text}" if path else text for path, text in list(told.items())[:SHOWN]]
    lines += [f"and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
    return Fault(400, "; ".join(lines), param=next(iter(told), None) or None)


def path_of(loc: Iterable[str | int]) -> str:
    """`messages[0].role` of pydantic's ("body", "messages", 0, "role")."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "body" and not part.startswith(UNION_TAGS):
            path += f".{part}" if path else part
    return path


def _sentence(problem: Mapping[str, Any]) -> str:
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return "this field is missing"
    if kind == "json_invalid":
        return f"the body is not JSON: {(problem.get('ctx') or {}).get('error', message)}"
    if kind in ("model_attributes_type", "model_type", "dict_type") and len(problem["loc"]) <= 1:
        return "the body must be a JSON object, sent as Content-Type: application/json"
    return message[:1].lower() + message[1:]
