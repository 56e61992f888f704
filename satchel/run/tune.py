"""The tune job: records that teach a model, most often through an adapter."""

from __future__ import annotations

from functools import partial

from satchel.core.job import TuneJob
from satchel.core.report import SILENT, Report
from satchel.model.source import find_source, load_tokenizer
from satchel.run.conduct import Beginning, conduct, load_weights
from satchel.run.data import read_dataset
from satchel.run.export import prompt_of
from satchel.run.receipt import Receipt


def tune(job: TuneJob, report: Report = SILENT) -> Receipt:
    """Run a tune job inside its budget; see `conduct` for what it leaves and what it raises."""
    return conduct(job, _begin, report)


def _begin(job: TuneJob, report: Report) -> Beginning:
    source = find_source(job.model)
    tokenizer = load_tokenizer(source)
    dataset = read_dataset(job, tokenizer)
    return Beginning(source.config, source, prompt_of(tokenizer), dataset, partial(load_weights, source))
