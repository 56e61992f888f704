"""From records to token ids, kept as flat arrays: 4 bytes a token and 1 for whether it is learnt.

Reading, checking and tokenizing are one pass over the source, so that raw text is never held whole. Every malformed
record is collected, and all of them are reported at once before anything is trained.

Longer than the context: a text is split into blocks of `context` tokens and loses nothing; a chat or a completion is
cut at the context, which a note counts; one whose answer lies wholly behind the cut is an error.

Shapes: N tokens of all documents, M documents.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from satchel.core.errors import DataError, UserError
from satchel.core.job import TuneJob
from satchel.run.packing import Stream, pack
from satchel.run.records import Place, Record, kind_of, read_records


class Tokenizer(Protocol):
    """What reading needs of a tokenizer."""

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str, special: bool = False) -> list[int]: ...

    def chat_tokens(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]: ...


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents, end to end."""

    tokens_N: np.ndarray  # int32
    learnt_N: np.ndarray  # bool: whether the token is a target
    starts_M1: np.ndarray  # int64: document m is tokens[starts[m]:starts[m + 1]]
    kind: str  # of record: text, completion, chat
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.starts_M1) - 1

    def keys(self, seed: int) -> np.ndarray:
        """A pseudo-random number for each document, [M] uint64: equal documents get equal numbers."""
        salt, starts = seed.to_bytes(8, "little", signed=True), self.starts_M1
        digests = b"".join(
            hashlib.blake2b(self.tokens_N[a:b].tobytes(), digest_size=8, key=salt).digest()
            for a, b in zip(starts[:-1], starts[1:], strict=True)
        )
        return np.frombuffer(digests, dtype=np.uint64)

    def digest(self) -> str:
        """A hash of all tokens and of which are learnt."""
        digest = hashlib.blake2b(digest_size=16)
        for values in (self.tokens_N, self.learnt_N):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """What a run trains on and what it is measured on; no document is in both."""

    train: Stream
    held_out: Stream  # may be empty
    kind: str
    notes: tuple[str, ...] = ()  # what happened to long records, and the like

    def fingerprint(self) -> str:
        """Changes when any token, split or row changes."""
        return hashlib.blake2b(f"{self.train.digest()} {self.held_out.digest()}".encode(), digest_size=16).hexdigest()


def read_dataset(job: TuneJob, tokenizer: Tokenizer) -> Dataset:
    """Read, check, tokenize, split and pack what `job.data` names.

    Raises UserError if a source is missing, and DataError with every malformed record.
    """
    corpus = tokenize(job.data, tokenizer, job.context)
    notes = corpus.notes
    if job.eval_data:
        other = tokenize(job.eval_data, tokenizer, job.context)
        if other.kind != corpus.kind:
            raise UserError(f"eval_data: holds {other.kind} records, but data holds {corpus.kind}; use one kind")
        shared = int(np.isin(other.keys(job.seed), corpus.keys(job.seed)).sum())
        notes += other.notes + ((f"{shared} held-out documents are in the training data too",) if shared else ())
        train, held_out = (corpus, np.arange(len(corpus))), (other, np.arange(len(other)))
    else:
        kept, held = split(corpus, job.eval_share, job.seed)
        if job.eval_share > 0 and not len(held):
            notes += ("nothing is held out: the data is too little to split; name eval_data for a held-out loss",)
        train, held_out = (corpus, kept), (corpus, held)
    rows, held_rows = (pack(documents, chosen, job.context, job.packing) for documents, chosen in (train, held_out))
    if 0 < job.eval_rows < len(held_rows):
        notes += (f"the held-out loss is that of {job.eval_rows} of {len(held_rows):,} rows; --eval-rows 0 takes all",)
        held_rows = held_rows.sample(job.eval_rows, job.seed)
    return Dataset(rows, held_rows, kind=corpus.kind, notes=notes)


def split(corpus: Corpus, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the documents to train on and of those held out, each in order.

    Documents are ranked by a hash of their content and the seed: equal documents fall on the same side, and adding
    data moves few of the old ones across. At least one document stays on each side, or nothing is held out.
    """
    keys = corpus.keys(seed)
    distinct = np.unique(keys)
    count = min(max(round(share * len(distinct)), 1), len(distinct) - 1) if share > 0 else 0
    held = keys < distinct[count] if count > 0 else np.zeros(len(keys), dtype=bool)
    return np.flatnonzero(~held), np.flatnonzero(held)


def tokenize(source: str, tokenizer: Tokenizer, context: int) -> Corpus:
    """Every record of `source` as token ids. Raises UserError or DataError as `read_dataset` does."""
    reading = _Reading(tokenizer, context)
    kinds: dict[str, Place] = {}
    for place, record in read_records(source, reading.problems.append):
        kind = kind_of(record, place, reading.problems.append)
        if kind is None:
            continue
        kinds.setdefault(kind, place)
        if next(iter(kinds)) == kind:
            reading.add(kind, record, place)
        else:
            first, where = next(iter(kinds.items()))
            reading.problems.append(
                f"{place}: a {kind} record, but {where} began with {first}; keep one kind of record in a run"
            )
    return reading.finish(source, next(iter(kinds), "text"))


@dataclass
class _Reading:
    """Arrays that grow while a source is read."""

    tokenizer: Tokenizer
    context: int
    tokens: array = field(default_factory=lambda: array("i"))
    learnt: bytearray = field(default_factory=bytearray)
    starts: array = field(default_factory=lambda: array("q", [0]))
    problems: list[str] = field(default_factory=list)
    cut: int = 0  # records that lost their end
    blocks: int = 0  # texts that were split

    def add(self, kind: str, record: Record, place: Place) -> None:
        """Tokenize one well-formed record and append it, unless nothing of it would be learnt."""
        try:
            ids, learnt = ENCODERS[kind](record, self.tokenizer)
        except UserError as error:
            self.problems.append(f"{place}: {error}")
            return
        longest = self.context + 1  # the last token is only a target
        if not any(learnt[1:longest]):  # the first token follows nothing
            why = f"begins behind the context of {self.context} tokens" if len(ids) > longest else "holds no token"
            self.problems.append(f"{place}: what is to be learnt {why}; raise context, or mend or remove the record")
            return
        if len(ids) > longest and kind == "text":
            self.blocks += 1
        elif len(ids) > longest:
            self.cut += 1
            ids, learnt = ids[:longest], learnt[:longest]
        self.tokens.extend(ids)
        self.learnt.extend(learnt)
        self.starts.append(len(self.tokens))

    def finish(self, source: str, kind: str) -> Corpus:
        """The corpus. Raises DataError with every problem."""
        if not self.problems and len(self.starts) == 1:
            self.problems.append(f"{source}: no record; write at least one")
        if self.problems:
            raise DataError(self.problems)
        notes = []
        if self.cut:
            notes.append(f"{self.cut} {kind} records are longer than the context of {self.context} tokens and were cut")
        if self.blocks:
            notes.append(f"{self.blocks} texts are longer than the context of {self.context} tokens and were split")
        return Corpus(
            np.frombuffer(self.tokens, dtype=np.int32),
            np.frombuffer(self.learnt, dtype=bool),
            np.frombuffer(self.starts, dtype=np.int64),
            kind,
            tuple(notes),
        )


Encoded = tuple[list[int], list[bool]]  # token ids, and whether each is learnt


def _encode_text(record: Record, tokenizer: Tokenizer) -> Encoded:
    ids = _open(record["text"], tokenizer) + _end(tokenizer)
    return ids, [True] * len(ids)


def _encode_completion(record: Record, tokenizer: Tokenizer) -> Encoded:
    prompt = _open(record["prompt"], tokenizer)
    completion = tokenizer.encode(record["completion"]) + _end(tokenizer)
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _encode_chat(record: Record, tokenizer: Tokenizer) -> Encoded:
    ids, learnt = tokenizer.chat_tokens(record["messages"])
    return list(ids), list(learnt)


def _open(text: str, tokenizer: Tokenizer) -> list[int]:
    """The text as a document begins, without the end token that some tokenizers would put behind it."""
    ids = tokenizer.encode(text, special=True)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


ENCODERS: dict[str, Any] = {"text": _encode_text, "completion": _encode_completion, "chat": _encode_chat}
