"""Bring the process to its working size before its memory is predicted: run the job in miniature, for real.

A job's first step loads what later ones share: kernels for the shapes of its products, their buffers, threads, modules
that torch and others import when first used. These bytes belong to no tensor, so no rehearsal sees them. The miniature
has a block of the job's own model and a small vocabulary; where that is large, a narrow one stands in: what it misses
is little beside such a model.
"""

import dataclasses
from importlib import import_module
from importlib.util import find_spec

import torch

from satchel.core.book import make
from satchel.core.job import Job
from satchel.model.batch import Batch
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.linear import dense_OI, linears, swap
from satchel.run.assemble import DTYPES, Assembly, assemble
from satchel.run.export import PROMPT_TOKENS, merge_checked
from satchel.run.step import mean_loss, train_step

MINIATURE = {"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2}
MINIATURE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256, "rms_norm_eps": 1e-5}
MINIATURE |= {"max_position_embeddings": 2048, "tie_word_embeddings": True, "hidden_act": "silu"}
VOCAB = 512
MOST = 64 << 20  # bytes of the miniature's weights
TOKENS = 1024  # at most
USED_LATER = ("torch.utils.tensorboard", "matplotlib.backends.backend_agg", "matplotlib.figure")  # if installed


def warm_up(job: Job, config: ModelConfig, device: str) -> None:
    """Two optimizer steps, an evaluation and what export does, on a model of one block; about a second."""
    for name in USED_LATER:
        if find_spec("tensorboard" if "tensorboard" in name else "matplotlib"):
            import_module(name)
    config = miniature(config, DTYPES[job.dtype])
    context = min(job.context, config.context, TOKENS)
    small = job.replace(context=context, optimizer="lomo" if job.adapter == "none" else "adamw", activations="none")
    assembly, batch = real(small, config, device, (context,) * max(min(job.batch, TOKENS // context), 1))
    for _ in range(2):
        train_step(assembly, [batch], 0.0)
    mean_loss(assembly, [batch])
    if assembly.adapter is not None and job.merge:
        _merge(assembly)


def miniature(config: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    """One block of the model and a small vocabulary; a narrow model if the block is large."""
    small = dataclasses.replace(config, layers=1, vocab=VOCAB)
    return small if small.parameters * dtype.itemsize <= MOST else ModelConfig.from_hf(MINIATURE)


@torch.no_grad()
def _merge(assembly: Assembly) -> None:
    for _, parameter in assembly.parameters:
        parameter.add_(0.01)  # a change of zero would be refused
    merge_checked(assembly.model, torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64))


def real(job: Job, config: ModelConfig, device: str, lengths: tuple[int, ...]) -> tuple[Assembly, Batch]:
    """A model of random weights, ready to train, and a micro-batch of random tokens."""
    decoder = Decoder(config, DTYPES[job.dtype], device)
    decoder.init_weights(torch.Generator(device).manual_seed(0))
    if storage := make("format", job.format):
        for path, module in linears(decoder).items():
            swap(decoder, path, storage.pack(dense_OI(module)))
    rng = torch.Generator().manual_seed(0)
    row = torch.randint(0, config.vocab, (1, sum(lengths)), generator=rng)
    return assemble(job, decoder), Batch(row, row.roll(-1), lengths, row.numel()).to(device)
