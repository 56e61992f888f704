"""A batch from one file into another, without a server. What was answered is kept: the same call goes on."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from satchel.core.disk import writing
from satchel.core.errors import UserError
from satchel.core.serve import ServeJob, Terms
from satchel.run.serve import Service, open_service
from satchel.run.server.grammar import Grammar
from satchel.run.server.lines import Answer, Line, answer_lines, read_lines
from satchel.run.server.start import open_house

Note = Callable[[int, int], None]  # lines answered, of how many
ENDLESS = Terms(queue=1 << 30, timeout_s=float("inf"))


@dataclass
class Done:
    """What a batch came to."""

    lines: int
    before: int  # that an earlier call had answered
    failed: int = 0  # whose answer is an error, of this call


def run_batch(job: ServeJob, source: Path, target: Path, note: Note = lambda done, of: None) -> Done:
    """Answers the lines of `source` that `target` has no answer to. Raises DataError for lines that are wrong, before
    anything is loaded; NoDisk when the disk is full, with what was written kept."""
    try:
        lines = read_lines(source.read_bytes().splitlines(), str(source))
    except OSError as fault:
        raise UserError(f"{source}: cannot be read: {fault.strerror}") from None
    answered = _resume(target, {line.custom_id for line in lines})
    left = [line for line in lines if line.custom_id not in answered]
    done = Done(len(lines), len(answered))
    if left:
        service = open_service(job, Grammar.ready, ENDLESS.reserve_bytes)
        try:
            asyncio.run(_run(service, left, target, done, note))
        finally:
            service.governor.end()
    return done


async def _run(service: Service, left: list[Line], target: Path, done: Done, note: Note) -> None:
    house, written = open_house(service, ENDLESS), done.before
    with writing(target.parent, "; what was answered is kept: the same command goes on"), target.open("ab") as out:

        def write(answer: Answer) -> None:
            nonlocal written
            out.write(json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            out.flush()
            written += 1
            done.failed += answer["response"]["status_code"] != 200
            note(written, done.lines)

        try:
            await answer_lines(house, left, "", write, 2 * house.limits.batch)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            await house.worker.stop()


def _resume(target: Path, known: set[str]) -> set[str]:
    """The lines that a file has answers to; what a killed run left unfinished at its end is cut off."""
    if not target.exists():
        with writing(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
        return set()
    with writing(target), target.open("r+b") as file:
        return _answered(file, target, known)


def _answered(file: IO[bytes], target: Path, known: set[str]) -> set[str]:
    found: set[str] = set()
    for line in file:
        if not line.endswith(b"\n"):
            file.seek(-len(line), os.SEEK_END)
            file.truncate()
            break
        try:
            id = json.loads(line)["custom_id"]
        except (ValueError, KeyError, TypeError):
            id = None
        if id not in known:
            raise UserError(f"{target}: holds answers to something else; name another file, or remove it")
        found.add(id)
    return found
