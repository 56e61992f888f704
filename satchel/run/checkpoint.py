"""Checkpoints that are whole or not there: `out/checkpoints/step-000123/`, and `latest`, a file with the newest's name.

    parameters.safetensors   what trains
    optimizer.safetensors    the tensors of the optimizer's state, and state.json everything else
    manifest.json            the CRC-32 of each of them

A checkpoint is written to a hidden folder, flushed to the disk, renamed, and only then `latest` is replaced; the last
two are kept. When its bytes are read and written is the affair of the saver, a method of the slot `checkpoint`; tensors
lie in their files largest first, as that copies them. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from satchel.core.disk import require_room, writing
from satchel.core.errors import JobError, ModelError, UserError
from satchel.core.seams import Saver
from satchel.model.disk import replace_text, sync, write_pieces, write_text
from satchel.model.encodings import PLAIN
from satchel.model.safetensors_io import Outgoing, header, read_safetensors
from satchel.model.stored import Part, Reader

KEPT = 2
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
PIECE = 1 << 20  # bytes of a file that are read at once
SLACK_BYTES = 1 << 20  # headers, JSON and the folder itself

State = dict[str, Any]  # JSON values


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose checksums were found to match."""

    folder: Path
    state: State

    def read_into(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Fill the given tensors from `file`, in place. Raises ModelError unless names, shapes and dtypes agree."""
        stored = read_safetensors(self.folder / f"{file}.safetensors")
        ours = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        theirs = {name: (s.shape, PLAIN[s.dtype]) for name, s in stored.items()}
        if differ := dict(ours.items() ^ theirs.items()):
            raise ModelError(f"{self.folder}: '{min(differ)}' differs between the checkpoint and this job's model")
        with Reader(stored) as reader:
            for name, tensor in tensors.items():
                if tensor.numel():
                    reader.read(Part(name), tensor.detach())

    def read(self, file: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of `file`, as they were saved."""
        stored = read_safetensors(self.folder / f"{file}.safetensors")
        tensors = {name: torch.empty(s.shape, dtype=PLAIN[s.dtype], device=device) for name, s in stored.items()}
        self.read_into(file, tensors)
        return tensors


def find_saved(folder: Path) -> Saved:
    """The checkpoint in a folder that a user named. Raises UserError if there is none, or it is damaged."""
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: no checkpoint; name a folder such as runs/tune/checkpoints/step-000100")
    if fault := damage(folder):
        raise UserError(f"{folder}: the checkpoint is damaged ({fault}); name another")
    return Saved(folder, json.loads((folder / STATE).read_text()))


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one output folder."""

    folder: Path
    saver: Saver
    note: Callable[[str], None] = lambda text: None  # told of a damaged checkpoint

    def save(self, step: int, state: State, files: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Have the checkpoint of `step` written: JSON state, and named tensors by file stem.

        Gives its folder, which is there when the saver has finished. If the disk is full or cannot be written, this or
        a later call of the saver raises NoDisk, and nothing of it is left behind.
        """
        target = self.folder / f"step-{step:06d}"
        ordered = {stem: _largest_first(named) for stem, named in files.items()}
        headers = {stem: header([_outgoing(*item) for item in named.items()]) for stem, named in ordered.items()}
        outline = _Outline(target, json.dumps(state | {"step": step}), headers, _nbytes(files))
        self.saver.save(ordered, partial(self._write, outline))
        return target

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait until what was saved is on the disk. An error that is under way is told rather than the saver's."""
        with suppress(Exception) if error else nullcontext():
            self.saver.finish()

    def _write(self, outline: _Outline, streams: Mapping[str, Iterable[memoryview]]) -> None:
        target = outline.target
        draft = self.folder / f".{target.name}.part"
        try:
            with writing(self.folder, self._last()):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                require_room(self.folder, outline.nbytes, self._last())
                draft.mkdir()
                outline.fill(draft, streams)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(draft, target)
                sync(self.folder)
                replace_text(self.folder / LATEST, target.name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        for old in self._folders()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Saved | None:
        """The newest whole checkpoint; None if none was ever saved. Raises JobError if all of them are damaged.

        Waits for one that is under way.
        """
        self.saver.finish()
        folders = self._folders()
        latest = self.folder / LATEST
        named = self.folder / latest.read_text().strip() if latest.exists() else None
        if named in folders:  # one that is newer than `latest` may not have reached the disk
            folders = folders[folders.index(named) :]
        for folder in folders:
            fault = damage(folder)
            if fault is None:
                return Saved(folder, json.loads((folder / STATE).read_text()))
            self.note(f"checkpoint {folder} is damaged ({fault}); going on from the one before it")
        if folders:
            raise JobError(f"{self.folder}: no checkpoint is whole; start again with another out, or empty this one")
        return None

    def require_space(self, files: Mapping[str, Mapping[str, Tensor]], copies: int = 1) -> None:
        """Raises NoDisk if the disk has no room for `copies` checkpoints of these tensors."""
        require_room(self.folder, copies * _nbytes(files), self._last())

    def _folders(self) -> list[Path]:
        """Folders of checkpoints, newest first."""
        return sorted(self.folder.glob("step-[0-9]*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)

    def _sweep(self) -> None:
        """Remove what a killed run left half-written."""
        for draft in self.folder.glob(".*.part"):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()

    def _last(self) -> str:
        folders = self._folders()
        return f"; kept: {folders[0]}" if folders else ""


@dataclass(frozen=True)
class _Outline:
    """All of a checkpoint but the bytes of its tensors."""

    target: Path
    state: str
    headers: dict[str, bytes]  # of the tensors' files, by stem
    nbytes: int  # that it takes of the disk at most

    def fill(self, draft: Path, streams: Mapping[str, Iterable[memoryview]]) -> None:
        """Write the files of the checkpoint into a folder, and flush them to the disk."""
        sums: dict[str, str] = {}
        for stem, stream in streams.items():
            checksum, path = Checksum(), draft / f"{stem}.safetensors"
            write_pieces(path, chain([self.headers[stem]], stream), checksum.update)
            sums[path.name] = str(checksum)
        write_text(draft / STATE, self.state)
        sums[STATE] = str(checksum_of(draft / STATE))
        write_text(draft / MANIFEST, json.dumps({"crc32": sums}, indent=1))
        sync(draft)


def _largest_first(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(named.items(), key=lambda item: -item[1].nbytes))


def _outgoing(name: str, tensor: Tensor) -> Outgoing:
    return Outgoing(name, tuple(tensor.shape), tensor.dtype, tensor.detach)


def _nbytes(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    """What a checkpoint of these tensors takes of the disk at most."""
    return sum(tensor.nbytes for named in files.values() for tensor in named.values()) + SLACK_BYTES


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is there and has its checksum."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())["crc32"]
        wrong = [name for name, saved in sums.items() if str(checksum_of(folder / name)) != saved]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{wrong[0]} does not have the checksum it was saved with" if wrong else None


def pull_tensors(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A state dict as JSON values; its tensors go to `tensors` by path. `push_tensors` undoes it."""
    match value:
        case Tensor():
            tensors[path] = value
            return {"tensor": path}
        case dict():  # as pairs: keys may be numbers, and their order counts
            return {"dict": [[k, pull_tensors(v, tensors, f"{path}.{k}".lstrip("."))] for k, v in value.items()]}
        case list() | tuple():
            items = [pull_tensors(v, tensors, f"{path}.{i}".lstrip(".")) for i, v in enumerate(value)]
            return {type(value).__name__: items}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{path} is a {type(value).__name__}, which cannot be saved without pickle")


def push_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state dict that `pull_tensors` took apart."""
    match value:
        case {"tensor": path}:
            return tensors[path]
        case {"dict": pairs}:
            return {k: push_tensors(v, tensors) for k, v in pairs}
        case {"list": items}:
            return [push_tensors(v, tensors) for v in items]
        case {"tuple": items}:
            return tuple(push_tensors(v, tensors) for v in items)
    return value


class Checksum:
    """The CRC-32 of bytes that come piece by piece; as text it is 8 hexadecimal digits."""

    value = 0

    def update(self, piece: bytes | memoryview) -> None:
        """The next bytes."""
        self.value = zlib.crc32(piece, self.value)

    def __str__(self) -> str:
        return f"{self.value:08x}"


def checksum_of(path: Path) -> Checksum:
    """That of a file, read in pieces."""
    checksum, piece = Checksum(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            checksum.update(piece[:count])
    return checksum
