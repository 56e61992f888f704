"""Text as token shards on disk: tokenized once, mapped into memory ever after.

    runs/.tokens/wiki-3f2a.../tokens.bin   token ids, 2 bytes each if the vocabulary allows, else 4
                             starts.bin   int64: where each document begins, and the end of the last
                             hashes.bin   uint64: of each document's tokens
                             meta.json    counts, and what it was made of

The name holds a hash of the text's bytes and of the tokenizer: changed text is another shard. A shard is written to a
hidden draft, flushed and renamed, under a lock: it is whole or not there, and two runs never write the same one. Text
is read record by record, and mapped pages are given back as they go, so that neither takes memory in proportion.

Shapes: N tokens of all documents, M documents.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from satchel.core.disk import writing
from satchel.core.errors import DataError
from satchel.model.disk import sync, write_text
from satchel.run.data import Corpus
from satchel.run.records import DEMO, find_files, kind_of, read_records

FORMAT = 1  # of the files; another number tokenizes anew
AT_ONCE = 1 << 19  # characters that are tokenized together
WINDOW = 1 << 22  # bytes of a shard that stay mapped
TELL_S = 30  # seconds between two words on how far tokenizing has come
MANY = 1000  # problems after which the rest is not read
META = "meta.json"


class BatchTokenizer(Protocol):
    """What sharding needs of a tokenizer."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def size(self) -> int: ...

    def encode_batch(self, texts: list[str], special: bool = False) -> list[list[int]]: ...

    def key(self) -> str: ...


class MappedTokens:
    """A flat array in a file. Slices are copied out, and the file's pages given back once WINDOW bytes were read."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._values_N = np.frombuffer(self._map, dtype)
        self._touched = 0

    def __len__(self) -> int:
        return len(self._values_N)

    def __getitem__(self, span: slice) -> np.ndarray:
        values = self._values_N[span].copy()
        self._touched += values.nbytes
        if self._touched >= WINDOW and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return values


@dataclass(frozen=True)
class Shard(Corpus):
    """A corpus of plain text on disk; all of it is learnt."""

    key: str = ""  # of text and tokenizer
    hashes_M: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def keys(self, seed: int) -> np.ndarray:
        """See `Corpus`."""
        return mixed(self.hashes_M + np.uint64(seed % 2**64))

    def digest(self) -> str:
        """See `Corpus`."""
        return self.key


def mixed(values_M: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that leaves no pattern: the finalizer of splitmix64."""
    mixed_M = values_M ^ (values_M >> np.uint64(30))
    mixed_M = mixed_M * np.uint64(0xBF58476D1CE4E5B9)
    mixed_M = (mixed_M ^ (mixed_M >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed_M ^ (mixed_M >> np.uint64(31))


def shard(
    source: str, tokenizer: BatchTokenizer, folder: Path, note: Callable[[str], None] = lambda text: None
) -> Shard:
    """The shard of a source of text in `folder`; tokenized now, which is noted, if it is not there.

    Raises UserError if there is no such source, DataError with its malformed records, NoDisk if the disk is full or
    cannot be written; nothing is left half-written.
    """
    key = f"{Path(source).stem}-{content_key(source, tokenizer)}"
    target = folder / key
    with writing(folder), _alone(folder):
        if not _is_whole(target):
            note(f"tokenizing {source} into {target}")
            _write(target, source, tokenizer, note)
    return _read(target, key)


def content_key(source: str, tokenizer: BatchTokenizer) -> str:
    """A hash of the text's bytes, of the tokenizer and of how shards are written."""
    digest = hashlib.blake2b(f"{FORMAT}/{tokenizer.key()}".encode(), digest_size=10)
    if source == DEMO:
        for place, record in read_records(source, lambda _: None):
            digest.update(f"{place}\0{record['text']}\0".encode())
        return digest.hexdigest()
    for path in find_files(source):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0".encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else writes shards into `folder` meanwhile; a process that was killed holds no lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for draft in folder.glob(".*.part"):
            shutil.rmtree(draft)
        yield


def _is_whole(target: Path) -> bool:
    """Whether the files are there and as long as they were written."""
    if not (target / META).exists():
        return False
    meta = json.loads((target / META).read_text())
    return all((target / name).exists() and (target / name).stat().st_size == n for name, n in meta["files"].items())


def _write(target: Path, source: str, tokenizer: BatchTokenizer, note: Callable[[str], None]) -> None:
    draft = target.with_name(f".{target.name}.part")
    draft.mkdir()
    try:
        dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.int32)
        with _Writing(draft, dtype) as files:
            told = time.monotonic()
            for documents in tokenized(source, tokenizer):
                files.add(documents)
                if time.monotonic() - told >= TELL_S:
                    told = time.monotonic()
                    note(f"{source}: {files.end:,} tokens so far")
        sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
        meta = {"format": FORMAT, "source": source, "dtype": dtype.name, "files": sizes}
        write_text(draft / META, json.dumps(meta, indent=1) + "\n")
        sync(draft)
        shutil.rmtree(target, ignore_errors=True)  # one that lacks bytes
        os.replace(draft, target)
        sync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class _Writing:
    """The files of a shard while it is written; flushed to the disk at the end."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.dtype, self.end = dtype, 0
        self.files: dict[str, IO[bytes]] = {
            name: (folder / f"{name}.bin").open("wb") for name in ("tokens", "starts", "hashes")
        }

    def __enter__(self) -> _Writing:
        self._append("starts", np.zeros(1, dtype=np.int64))
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for file in self.files.values():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()

    def add(self, documents: list[list[int]]) -> None:
        """Append documents."""
        arrays = [np.array(ids, dtype=self.dtype) for ids in documents]
        digests = b"".join(hashlib.blake2b(ids.tobytes(), digest_size=8).digest() for ids in arrays)
        ends = self.end + np.cumsum([len(ids) for ids in arrays])
        self.end = int(ends[-1])
        self._append("tokens", np.concatenate(arrays))
        self._append("starts", ends.astype(np.int64))
        self._append("hashes", np.frombuffer(digests, dtype=np.uint64))

    def _append(self, name: str, values: np.ndarray) -> None:
        self.files[name].write(values.data)


def _read(target: Path, key: str) -> Shard:
    dtype = np.dtype(json.loads((target / META).read_text())["dtype"])
    tokens: Any = MappedTokens(target / "tokens.bin", dtype)
    starts = np.fromfile(target / "starts.bin", dtype=np.int64)
    hashes = np.fromfile(target / "hashes.bin", dtype=np.uint64)
    return Shard(tokens, np.broadcast_to(np.True_, len(tokens)), starts, "text", key=key, hashes_M=hashes)


def tokenized(source: str, tokenizer: BatchTokenizer) -> Iterator[list[list[int]]]:
    """The documents of a source as token ids, some at a time. Raises DataError at the end with every problem."""
    problems: list[str] = []
    texts, chars, found = [], 0, False
    for text in _texts(source, problems):
        texts.append(text)
        chars += len(text)
        if chars >= AT_ONCE:
            yield _encode(texts, tokenizer)
            texts, chars, found = [], 0, True
    if texts and not problems:
        yield _encode(texts, tokenizer)
    if not problems and not texts and not found:
        problems.append(f"{source}: no record; write at least one")
    if problems:
        raise DataError(problems)


def _texts(source: str, problems: list[str]) -> Iterator[str]:
    """Every well-formed text; what is wrong with the others goes to `problems`."""
    for place, record in read_records(source, problems.append):
        kind = kind_of(record, place, problems.append)
        if kind not in (None, "text"):
            problems.append(f"{place}: a {kind} record; pre-training reads plain text: write it into 'text', or tune")
        elif kind:
            yield record["text"]
        if len(problems) >= MANY:
            return


def _encode(texts: list[str], tokenizer: BatchTokenizer) -> list[list[int]]:
    """Each text as a document: framed as the model expects, with exactly one end token."""
    eos = tokenizer.eos_id
    end = [] if eos is None else [eos]
    return [(ids[:-1] if ids and ids[-1] == eos else ids) + end for ids in tokenizer.encode_batch(texts, special=True)]
