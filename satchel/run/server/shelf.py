"""`/v1/files` and `/v1/batches`: files of requests, answered in the background, for whoever brought them.

Files live in a folder that goes with the server. A batch takes half of the engine's places at most.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from satchel.core.errors import DataError
from satchel.run.server.faults import Fault
from satchel.run.server.house import House
from satchel.run.server.lines import Answer, Line, answer_lines, read_lines

Plain = dict[str, Any]


@dataclass
class Stored:
    """A file."""

    owner: str
    path: Path
    facts: Plain


@dataclass
class Batch:
    """A file that is being answered."""

    owner: str
    facts: Plain
    task: asyncio.Task[None] | None = None


@dataclass
class Shelf:
    """The files and batches of one server."""

    house: House
    files: dict[str, Stored] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    home: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="satchel-files-")
    )

    def put(self, owner: str, name: str, purpose: str, content: bytes) -> Plain:
        """Keep a file."""
        id = f"file-{uuid.uuid4().hex}"
        path = Path(self.home.name) / id
        try:
            path.write_bytes(content)
        except OSError as error:
            raise Fault(507, f"the file cannot be kept: {error.strerror}", kind="server_error") from None
        facts = {"id": id, "object": "file", "bytes": len(content), "created_at": int(time.time())}
        facts |= {"filename": name, "purpose": purpose, "status": "processed"}
        self.files[id] = Stored(owner, path, facts)
        return facts

    def file(self, owner: str, id: str) -> Stored:
        """A file of this owner. Raises Fault if there is none."""
        if (found := self.files.get(id)) is None or found.owner != owner:
            raise Fault(404, f"no file '{id}'", param="file_id", code="not_found")
        return found

    def drop(self, owner: str, id: str) -> Plain:
        """Forget a file."""
        self.file(owner, id).path.unlink(missing_ok=True)
        del self.files[id]
        return {"id": id, "object": "file", "deleted": True}

    def batch(self, owner: str, id: str) -> Batch:
        """A batch of this owner. Raises Fault if there is none."""
        if (found := self.batches.get(id)) is None or found.owner != owner:
            raise Fault(404, f"no batch '{id}'", param="batch_id", code="not_found")
        return found

    def begin(self, owner: str, file_id: str, url: str, metadata: dict[str, str] | None) -> Plain:
        """Answer a file in the background. Raises Fault for a file that is not there."""
        source = self.file(owner, file_id).path
        facts: Plain = {"id": f"batch_{uuid.uuid4().hex}", "object": "batch", "endpoint": url}
        facts |= {"input_file_id": file_id, "completion_window": "24h", "created_at": int(time.time())}
        facts |= {"status": "in_progress", "errors": None, "output_file_id": None, "error_file_id": None}
        facts |= {"request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": metadata}
        batch = self.batches[facts["id"]] = Batch(owner, facts)
        try:
            lines = read_lines(source.read_bytes().splitlines(), "line", url)
        except DataError as error:
            data = [{"message": problem, "code": "invalid_line", "param": None} for problem in error.problems]
            facts |= {"status": "failed", "errors": {"object": "list", "data": data}, "failed_at": int(time.time())}
        else:
            facts["request_counts"]["total"] = len(lines)
            batch.task = asyncio.create_task(self._run(batch, lines))
        return facts

    def cancel(self, owner: str, id: str) -> Plain:
        """End a batch; what was answered is kept."""
        batch = self.batch(owner, id)
        if batch.task is not None and batch.task.cancel():
            batch.facts["status"] = "cancelling"
        return batch.facts

    async def _run(self, batch: Batch, lines: list[Line]) -> None:
        good: list[Answer] = []
        bad: list[Answer] = []
        counts = batch.facts["request_counts"]

        def write(answer: Answer) -> None:
            fine = answer["response"]["status_code"] == 200
            (good if fine else bad).append(answer)
            counts["completed" if fine else "failed"] += 1

        status = "failed"
        try:
            await answer_lines(self.house, lines, batch.owner, write, max(self.house.limits.batch // 2, 1))
            status = "completed"
        except asyncio.CancelledError:
            status = "cancelled"
        except ExceptionGroup as group:
            data = [{"message": str(group.exceptions[0]), "code": "server_error", "param": None}]
            batch.facts["errors"] = {"object": "list", "data": data}
        for answers, key, name in ((good, "output_file_id", "output"), (bad, "error_file_id", "errors")):
            if answers:
                content = "".join(json.dumps(answer) + "\n" for answer in answers).encode()
                batch.facts[key] = self.put(batch.owner, f"{name}.jsonl", "batch_output", content)["id"]
        batch.facts |= {"status": status, f"{status}_at": int(time.time())}
