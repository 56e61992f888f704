"""The sources of a pre-training job as one stream: sharded, split, laid into full rows, mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from satchel.core.book import make
from satchel.core.errors import UserError
from satchel.core.job import PretrainJob
from satchel.core.report import SILENT, Report
from satchel.run.data import Dataset, split
from satchel.run.mixture import Mixed
from satchel.run.packing import Rows, fill
from satchel.run.records import SUFFIXES, require_source
from satchel.run.shards import BatchTokenizer, Shard, shard

FOLDER = ".tokens"  # beside the output, so that several runs share it


def read_sources(job: PretrainJob, tokenizer: BatchTokenizer, report: Report = SILENT) -> Dataset:
    """Shard, split and mix what `job.data` names; what `job.eval_data` names is held out whole.

    Raises UserError if a source is missing or nothing of it is left to train on, DataError with its malformed records,
    NoDisk if there is no room for the tokens.
    """
    folder = Path(job.out).absolute().parent / FOLDER
    paths = [path for path, _ in job.sources]
    names = names_of([*paths, *job.eval_data])
    for path in (*paths, *job.eval_data):  # before the first of them is tokenized, which may take long
        require_source(path)
    shards = [shard(path, tokenizer, folder, report.note) for path in (*paths, *job.eval_data)]
    sources = dict(zip(names, shards[: len(paths)], strict=False))
    watched = dict(zip(names[len(paths) :], shards[len(paths) :], strict=True))
    splits = {name: split(each, job.eval_share, job.seed) for name, each in sources.items()}
    chosen = _chosen(job, [Part(each, splits[name][0]) for name, each in sources.items()])
    train = {name: fill(sources[name], kept, job.context) for name, kept in zip(sources, chosen, strict=True)}
    held = {name: _held_out(job, sources[name], held) for name, (_, held) in splits.items() if len(held)}
    held |= {name: _held_out(job, each, np.arange(len(each))) for name, each in watched.items()}
    mixed = Mixed(train, _weights(job, train), make("mixture", job.mixture))
    notes = (*_passes(job, mixed), *_gaps(job, sources, held), *_overlaps(sources, watched))
    return Dataset(mixed, Mixed(held), kind="text", notes=notes)


def names_of(paths: Sequence[str]) -> list[str]:
    """What each source is called: its file or folder, or the whole path where two would be called the same."""
    short = [Path(p).stem if Path(p).suffix.lower() in SUFFIXES else Path(p).name for p in paths]
    count = Counter(short)
    return [name if name and count[name] == 1 else path for name, path in zip(short, paths, strict=True)]


@dataclass(frozen=True)
class Part:
    """Some documents of a source, by number."""

    source: Shard
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: int) -> np.ndarray:
        document = self.documents[number]
        return self.source.tokens_N[int(self.source.starts_M1[document]) : int(self.source.starts_M1[document + 1])]


def _chosen(job: PretrainJob, parts: list[Part]) -> list[np.ndarray]:
    """The documents of each source that are trained on."""
    selector = make("selector", job.selector)
    masks = selector.choose(parts, job.seed) if selector else [np.ones(len(part), dtype=bool) for part in parts]
    return [part.documents[mask] for part, mask in zip(parts, masks, strict=True)]


def _held_out(job: PretrainJob, source: Shard, documents: np.ndarray) -> Rows:
    """The rows that evaluations take of a source."""
    rows = fill(source, documents, job.context)
    return rows.sample(job.eval_rows, job.seed) if 0 < job.eval_rows < len(rows) else rows


def _weights(job: PretrainJob, train: dict[str, Rows]) -> tuple[float, ...]:
    """The sources' weights, if any are given. Raises UserError if one that is to be drawn from holds no row."""
    weights = tuple(weight for _, weight in job.sources if weight is not None)
    for (name, rows), weight in zip(train.items(), weights or (1.0,) * len(train), strict=True):
        if weight and not len(rows):
            raise UserError(f"data: nothing of {name} is left to train on; add documents, or lower eval_share")
    return weights


def _passes(job: PretrainJob, mixed: Mixed) -> Iterator[str]:
    """How much of each source the run will see."""
    steps, total = mixed.length(job.batch, job.steps, job.epochs)
    fed = mixed.fed(job.batch, total, job.seed, steps)
    for name, part in mixed.parts.items():
        share, passes = fed[name] / max(sum(fed.values()), 1), fed[name] / max(part.tokens, 1)
        yield f"{name}: {part.tokens:,} tokens, {share:.1%} of the run, {passes:.2f} passes"


def _gaps(job: PretrainJob, sources: dict[str, Shard], held: dict[str, Rows]) -> Iterator[str]:
    """Sources of which nothing is held out."""
    for name in sources:
        if job.eval_share > 0 and name not in held:
            yield f"{name}: nothing is held out, it is too little to split; name eval_data for a held-out loss"


def _overlaps(sources: dict[str, Shard], watched: dict[str, Shard]) -> Iterator[str]:
    """Documents of `eval_data` that are trained on too."""
    known = np.concatenate([each.hashes_M for each in sources.values()])
    for name, each in watched.items():
        if shared := int(np.isin(each.hashes_M, known).sum()):
            yield f"{name}: {shared} of {len(each)} documents to evaluate are in the training data too"
