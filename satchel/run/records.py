"""Reading and checking training records, one at a time, each with the place that an error would name.

Kinds of record:
    text        {"text": "..."}                                       loss on every token
    completion  {"prompt": "...", "completion": "..."}                loss on the completion
    chat        {"messages": [{"role": "user", "content": "..."}]}    loss on what the assistant says

A source is a .jsonl, .parquet, .txt or .md file, a folder of them, or `demo`: the language reference that every Python
carries. A text file is one document; a long one is cut at blank lines.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from satchel.core.errors import UserError, nearest

Record = dict[str, Any]
Complain = Callable[[str], None]  # takes one problem: place, field, what is wrong, the cure

DEMO = "demo"
SUFFIXES = (".jsonl", ".parquet", ".txt", ".md")
KINDS = {"text": ("text",), "completion": ("prompt", "completion"), "chat": ("messages",)}
ROLES = ("system", "user", "assistant", "tool")
FIELD_ALIASES = {"role": ("from", "speaker"), "content": ("value", "text")}  # what other tools call them
ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
DOCUMENT_CHARS = 16384  # a text file is cut at the first blank line after so many characters

CURES = {  # a field that other tools use -> what to do about it
    "instruction": "rename 'instruction' (with 'input' joined to it) to 'prompt' and 'output' to 'completion'",
    "output": "rename 'output' to 'completion' and what it answers to 'prompt'",
    "response": "rename 'response' to 'completion' and what it answers to 'prompt'",
    "question": "rename 'question' to 'prompt' and 'answer' to 'completion'",
    "conversations": "rename 'conversations' to 'messages', 'from' to 'role' and 'value' to 'content'",
    "conversation": "rename 'conversation' to 'messages', a list of {'role', 'content'}",
    "content": "rename 'content' to 'text'",
    "document": "rename 'document' to 'text'",
    "chosen": "this is preference data, which this objective cannot use; keep 'chosen' as 'completion'",
}


@dataclass(frozen=True)
class Place:
    """Where a record stands: `notes.jsonl:17`."""

    file: str
    line: int = 0  # from 1; 0: the whole file

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


def read_records(source: str, complain: Complain) -> Iterator[tuple[Place, Record]]:
    """Every record of `source` in a fixed order, checked as far as its file format goes; the rest goes to `complain`.

    Raises UserError if the source does not exist or holds no file that can be read.
    """
    if source == DEMO:
        yield from ((Place(f"demo/{name}"), {"text": topics[name]}) for name in sorted(topics))
        return
    for path in find_files(source):
        found = False
        for place, record in READERS[path.suffix.lower()](path, complain):
            found = True
            if record is not None:
                yield place, record
        if not found:
            complain(f"{path}: the file is empty; remove it or write records into it")


def require_source(source: str) -> None:
    """Raises UserError unless the source is there."""
    if source != DEMO:
        find_files(source)


def find_files(source: str) -> list[Path]:
    """The data files at `source`, sorted. Raises UserError with the way out when there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"data: {source} holds no {', '.join(SUFFIXES)} file; put the records into one of these")
        return files
    if not path.exists():
        raise UserError(f"data: {source} does not exist; {_near(path)} 'demo' is Python's own language reference")
    if path.suffix.lower() not in SUFFIXES:
        cure = "one JSON object a line in a .jsonl file" if path.suffix.lower() in (".json", ".csv", ".tsv") else ""
        raise UserError(
            f"data: {source} ends in '{path.suffix}', which is not read; {cure or 'use ' + ', '.join(SUFFIXES)}"
        )
    return [path]


def _near(path: Path) -> str:
    """`did you mean 'notes.jsonl'?`, or nothing if no data lies there under such a name."""
    there = path.parent.iterdir() if path.parent.is_dir() else []
    hint = nearest(path.name, [p.name for p in there if p.is_dir() or p.suffix.lower() in SUFFIXES])
    return hint if hint.startswith("did you mean") else "give a file or folder that does;"


def _read_jsonl(path: Path, complain: Complain) -> Iterator[tuple[Place, Record | None]]:
    with path.open("rb") as file:
        if fault := _not_lines(file.read(4096)):
            complain(f"{path}: {fault}")
            yield Place(str(path)), None
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                place = Place(str(path), number)
                yield place, _parse(line, place, complain)


def _not_lines(head: bytes) -> str:
    """What makes a file no JSON lines as a whole, told once instead of once a line; empty if nothing does."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "the file is UTF-16; save it as UTF-8"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"[") and not text.partition(b"\n")[0].rstrip().endswith(b"]"):
        return "the file is one JSON array; write its objects one a line, without brackets around and commas between"
    return ""


def _parse(line: bytes, place: Place, complain: Complain) -> Record | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        complain(f"{place}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        complain(f"{place}: broken JSON, {where}; write one JSON object a line")
    else:
        if isinstance(record, dict):
            return record
        complain(f"{place}: the line is {_a(record)}, not an object; write one JSON object a line")
    return None


def _read_parquet(path: Path, complain: Complain) -> Iterator[tuple[Place, Record | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield Place(str(path), number), record
    except (pa.ArrowException, OSError) as error:
        complain(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}); write it again")
        yield Place(str(path)), None


def _read_text(path: Path, complain: Complain) -> Iterator[tuple[Place, Record | None]]:
    lines, chars, first = [], 0, 1
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    complain(f"{path}:{number}: a zero byte, so this is no text; remove the file, or save it as UTF-8")
                    yield Place(str(path)), None
                    return
                lines.append(line)
                chars += len(line)
                if chars >= DOCUMENT_CHARS and not line.strip():
                    yield Place(str(path), first), {"text": "".join(lines)}
                    lines, chars, first = [], 0, number + 1
    except UnicodeDecodeError as error:
        complain(f"{path}: {error.reason} near line {first + len(lines)}; save the file as UTF-8")
        yield Place(str(path)), None
        return
    if "".join(lines).strip():
        yield Place(str(path), first), {"text": "".join(lines)}


READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".txt": _read_text, ".md": _read_text}


def kind_of(record: Record, place: Place, complain: Complain) -> str | None:
    """The kind of a well-formed record; otherwise None, and every fault of it has gone to `complain`."""
    # Parquet gives each row all columns: a null there is a field that the record has not.
    fields = {name for name, value in record.items() if value is not None}
    kinds = [kind for kind, needed in KINDS.items() if fields.issuperset(needed)]
    if not kinds:
        nulls = [name for needed in KINDS.values() for name in needed if name in record and name not in fields]
        complain(f"{place}: " + (f"field '{nulls[0]}' is null; write a value" if nulls else _missing(fields)))
        return None
    if len(kinds) > 1:
        named = " and ".join(f"'{KINDS[kind][0]}'" for kind in kinds)
        complain(f"{place}: the record has {named}, which are two kinds of record; keep one of them")
        return None
    problems = list(CHECKS[kinds[0]](record)) or list(_check_characters(record, KINDS[kinds[0]]))
    for problem in problems:
        complain(f"{place}: {problem}")
    return None if problems else kinds[0]


def _missing(fields: set[str]) -> str:
    for half, other in (("prompt", "completion"), ("completion", "prompt")):
        if half in fields:
            cured = next((CURES[name] for name in CURES if name in fields), f"add '{other}'")
            return f"field '{half}' stands without '{other}'; {cured}"
    for name, cure in CURES.items():
        if name in fields:
            return f"field '{name}' is not read; {cure}"
    has = f"has only {', '.join(map(repr, sorted(fields)))}" if fields else "is empty"
    return f"the record {has}; it needs 'text', or 'prompt' and 'completion', or 'messages'"


def _check_text(record: Record) -> Iterator[str]:
    yield from _check_string(record["text"], "field 'text'", "remove the record")


def _check_completion(record: Record) -> Iterator[str]:
    if isinstance(record["prompt"], list):
        yield "field 'prompt' is a list; put the turns, the answer too, into 'messages'"
    elif not isinstance(record["prompt"], str):  # an empty prompt is a completion from nothing, and allowed
        yield f"field 'prompt' is {_a(record['prompt'])}; write a string"
    yield from _check_string(record["completion"], "field 'completion'", "write the answer or remove the record")


def _check_chat(record: Record) -> Iterator[str]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else _a(messages)
        yield f"field 'messages' is {what}; write a list of {{'role', 'content'}}"
        return
    for index, message in enumerate(messages):
        yield from _check_message(message, f"field 'messages[{index}]'")
    if not any(isinstance(m, dict) and m.get("role", "assistant") == "assistant" for m in messages):
        yield "field 'messages' has no assistant turn, so nothing would be learnt; add one or remove the record"


def _check_message(message: Any, field: str) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"{field} is {_a(message)}; write {{'role': 'user', 'content': '...'}}"
        return
    if message.get("role") is None or message.get("content") is None:
        missing = "role" if message.get("role") is None else "content"
        alias = next((name for name in FIELD_ALIASES[missing] if name in message), "")
        yield f"{field} has no '{missing}'; " + (f"rename '{alias}' to '{missing}'" if alias else "add it")
        return
    role, content = message["role"], message["content"]
    if role not in ROLES:
        meant = ROLE_ALIASES.get(str(role).lower())
        hint = f"did you mean '{meant}'?" if meant else nearest(str(role), ROLES)
        yield f"{field} has the unknown role '{role}'; {hint}"
    if not isinstance(content, str):
        yield f"{field} has {_a(content)} as 'content'; write a string"
    elif role == "assistant" and not content.strip():
        yield f"{field} is an empty assistant turn; write the answer or remove the turn"


def _check_string(value: Any, field: str, cure: str) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{field} is {_a(value)}; write a string"
    elif not value.strip():
        yield f"{field} is empty; {cure}"


def _check_characters(record: Record, fields: tuple[str, ...]) -> Iterator[str]:
    r"""JSON can spell half a character, `\ud83d` alone, which is no text: no tokenizer takes it."""
    for field in fields:
        value = record[field]
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            yield f"field '{field}' holds half a character, {error.object[error.start]!a}; remove it or write it whole"


CHECKS = {"text": _check_text, "completion": _check_completion, "chat": _check_chat}


def _a(value: Any) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
