"""A rehearsal against the run that it rehearses: the bytes of torch's allocator, on real tensors."""

import dataclasses
import time

import pytest
import torch

from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.rehearse import rehearse
from tests.run.real import needs_pool, real_peaks
from tests.tolerances import REHEARSED

TOY = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 640, "rms_norm_eps": 1e-5}
TOY |= {"tie_word_embeddings": True, "max_position_embeddings": 1024, "hidden_act": "silu"}
LLAMA_70B = TOY | {"vocab_size": 128256, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "tie_word_embeddings": False,
}

JOBS = [
    {},
    {"adapter": "none"},
    {"adapter": "none", "dtype": "fp32", "micro_batch": 2},
    {"activations": "full"},
    {"format": "int8"},
    {"micro_batch": 1, "context": 512},
]


@needs_pool
@pytest.mark.parametrize("fields", JOBS, ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()) or "plain")
def test_peak_of_live_bytes_is_the_real_runs_within_two_percent(fields: dict) -> None:
    check(fields, ())


@needs_pool
def test_documents_of_uneven_length_are_rehearsed_as_they_lie() -> None:
    check({"batch": 1, "micro_batch": 1}, (256, 100, 100, 56))


def check(fields: dict, lengths: tuple[int, ...]) -> None:
    job = TuneJob(**({"model": "toy", "data": "demo", "context": 256, "batch": 4, "micro_batch": 4} | fields))
    (real,) = real_peaks([(TOY, job, lengths)])
    train = next(p for p in rehearse(job, ModelConfig.from_hf(TOY), lengths).phases if p.name == "train")
    assert train.peak_bytes == pytest.approx(real["train"], rel=REHEARSED)


def test_a_70b_model_is_rehearsed_without_its_memory_or_its_time() -> None:
    config = ModelConfig.from_hf(LLAMA_70B)
    job = TuneJob(model="70b", data="demo", context=4096, batch=1)
    rehearse(job, dataclasses.replace(config, layers=3))  # imports and caches
    start = time.process_time()
    rehearsal = rehearse(job, config)
    assert time.process_time() - start < 3
    weights = 2 * config.parameters
    assert rehearsal.phases[-1].accounts["weights"] == pytest.approx(weights, rel=1e-3)
    assert rehearsal.peak.peak_bytes > 1.05 * weights


def test_work_counts_the_matrix_products_of_the_whole_model() -> None:
    config = ModelConfig.from_hf(TOY | {"num_hidden_layers": 30})
    job = TuneJob(model="toy", data="demo", context=256, batch=4, micro_batch=1, dtype="fp32")
    whole = rehearse(job, config)
    flops = sum(item.flops * count for item, count in whole.work.items() if item.kind.startswith("product/float32"))
    matrices = config.parameters - 4096 * 256
    least = 4 * matrices * 1024 + 6 * 4096 * 256 * 1024  # forward and gradient of x; the head's in the forward pass
    assert least < flops < 1.3 * least


def test_rehearsing_draws_no_random_numbers_from_the_process() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rehearse(TuneJob(model="toy", data="demo", context=64, batch=2), ModelConfig.from_hf(TOY))
    assert torch.equal(before, torch.get_rng_state())


def test_merging_into_packed_weights_is_rehearsed_as_a_phase_of_its_own() -> None:
    """A packed model becomes a dense one: what the merge holds at its end, all matrices in bf16, beside the packed."""
    config = ModelConfig.from_hf(TOY | {"num_hidden_layers": 12})
    job = TuneJob(model="toy", data="demo", context=64, batch=1, format="nf4", merge=True)
    phases = {phase.name: phase for phase in rehearse(job, config).phases}
    assert list(phases) == ["load", "train", "evaluate", "check", "merge", "save"]
    assert phases["merge"].peak_bytes > 2 * config.parameters > phases["load"].accounts["weights"]
    assert phases["save"].accounts["weights"] == pytest.approx(2 * config.parameters, rel=1e-3)
