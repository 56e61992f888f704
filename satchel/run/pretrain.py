"""The pretrain job: plain text in a mixture, from random weights or on from a model."""

from __future__ import annotations

from functools import partial

from satchel.core.job import PretrainJob, TrainJob
from satchel.core.report import SILENT, Report
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.load import draw
from satchel.model.source import find_source, load_tokenizer
from satchel.run.assemble import DTYPES
from satchel.run.conduct import Beginning, conduct, load_weights
from satchel.run.export import prompt_of
from satchel.run.receipt import Receipt
from satchel.run.sources import read_sources


def pretrain(job: PretrainJob, report: Report = SILENT) -> Receipt:
    """Run a pretrain job inside its budget; see `conduct` for what it leaves and what it raises."""
    return conduct(job, _begin, report)


def _begin(job: PretrainJob, report: Report) -> Beginning:
    source = find_source(job.model, weights=not job.scratch)
    tokenizer_from = find_source(job.tokenizer, weights=False) if job.tokenizer else source
    tokenizer = load_tokenizer(tokenizer_from, source.config)
    dataset = read_sources(job, tokenizer, report)
    load = partial(_draw, source.config) if job.scratch else partial(load_weights, source)
    return Beginning(source.config, tokenizer_from, prompt_of(tokenizer), dataset, load)


def _draw(config: ModelConfig, job: TrainJob, device: str) -> Decoder:
    return draw(config, DTYPES[job.dtype], device, job.seed)
