"""Bring the process to its working size before its memory is predicted: run the job in miniature, for real.

A job's first step loads what later ones share: kernels, threads, modules that torch and others import when first used.
These bytes belong to no tensor, so no rehearsal sees them; a job of a million parameters costs the same.
"""

import dataclasses
from importlib import import_module
from importlib.util import find_spec

import torch

from satchel.core.book import make
from satchel.core.job import TuneJob
from satchel.model.batch import Batch
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.linear import dense_OI, linears, swap
from satchel.run.assemble import DTYPES, Assembly, assemble
from satchel.run.step import mean_loss, train_step

MINIATURE = {"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2}
MINIATURE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256, "rms_norm_eps": 1e-5}
MINIATURE |= {"max_position_embeddings": 512, "tie_word_embeddings": True, "hidden_act": "silu"}
TOKENS = 160
USED_LATER = ("torch.utils.tensorboard", "matplotlib.backends.backend_agg", "matplotlib.figure")  # if installed


def warm_up(job: TuneJob, device: str) -> None:
    """Two optimizer steps and an evaluation of `job`'s methods on a model of two layers; well under a second."""
    for name in USED_LATER:
        if find_spec("tensorboard" if "tensorboard" in name else "matplotlib"):
            import_module(name)
    methods = {"adapter": job.adapter if job.adapter == "none" else "lora", "dtype": job.dtype}
    small = dataclasses.replace(TuneJob(model=job.model, data=job.data), context=TOKENS, batch=1, **methods)
    assembly, batch = real(small, ModelConfig.from_hf(MINIATURE), device, (TOKENS - 60, 60))
    for _ in range(2):
        train_step(assembly, [batch], 0.0)
    mean_loss(assembly, [batch])


def real(job: TuneJob, config: ModelConfig, device: str, lengths: tuple[int, ...]) -> tuple[Assembly, Batch]:
    """A model of random weights, ready to train, and a micro-batch of random tokens."""
    decoder = Decoder(config, DTYPES[job.dtype], device)
    decoder.init_weights(torch.Generator(device).manual_seed(0))
    if storage := make("format", job.format):
        for path, module in linears(decoder).items():
            swap(decoder, path, storage.pack(dense_OI(module)))
    rng = torch.Generator().manual_seed(0)
    row = torch.randint(0, config.vocab, (1, sum(lengths)), generator=rng)
    return assemble(job, decoder), Batch(row, row.roll(-1), lengths, row.numel()).to(device)
