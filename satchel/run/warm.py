"""Bring the process to its working size before its memory is predicted: run the job in miniature, for real.

A job's first step loads what later ones share: kernels for the shapes of its products, their buffers, threads, modules
that torch and others import when first used. These bytes belong to no tensor, so no rehearsal sees them. The miniature
has a block of the job's own model and a small vocabulary; where that is large, a narrow one stands in: what it misses
is little beside such a model.
"""

import dataclasses
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch

from satchel.core.book import make
from satchel.core.job import TrainJob
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


def warm_up(job: TrainJob, config: ModelConfig, device: str) -> None:
    """Two optimizer steps, an evaluation and what export does, on a model of one block; about a second."""
    for name in USED_LATER:
        if find_spec("tensorboard" if "tensorboard" in name else "matplotlib"):
            import_module(name)
    config = miniature(config, DTYPES[job.dtype])
    context = min(job.context, config.context, TOKENS)
    small = job.replace(context=context, optimizer="lomo" if job.adapter == "none" else "adamw", activations="none")
    assembly, batch = real(small, config, device, (context,) * max(min(job.batch, TOKENS // context), 1))
    _exercise(assembly, Samples([batch], [batch]), job.merge)


@dataclass(frozen=True)
class Samples:
    """Batches of the sizes that a run sees."""

    trained: list[Batch]
    evaluated: list[Batch]


def settle(job: TrainJob, config: ModelConfig, device: str, samples: Samples) -> None:
    """The same with what the miniature leaves out: the whole vocabulary, the job's own methods, batches of the sizes
    that the run will see. It takes less than the job itself, which has more layers, and leaves little to grow by.

    Raises torch.OutOfMemoryError where a limit on tensors is in force that does not admit even that.
    """
    _exercise(shell(job, dataclasses.replace(config, layers=1), device), samples, job.merge)


def _exercise(assembly: Assembly, samples: Samples, merge: bool) -> None:
    """What a run does once everything is loaded."""
    device = assembly.parameters[0][1].device
    for batch in samples.trained:
        for _ in range(2):
            train_step(assembly, [batch.to(device)], 0.0)
    mean_loss(assembly, (batch.to(device) for batch in samples.evaluated))
    if assembly.adapter is not None and merge:
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


def real(job: TrainJob, config: ModelConfig, device: str, lengths: tuple[int, ...]) -> tuple[Assembly, Batch]:
    """A model of random weights, ready to train, and a micro-batch of random tokens."""
    return shell(job, config, device), noise(config.vocab, lengths).to(device)


def shell(job: TrainJob, config: ModelConfig, device: str) -> Assembly:
    """A model of random weights, ready to train."""
    decoder = Decoder(config, DTYPES[job.dtype], device)
    decoder.init_weights(torch.Generator(device).manual_seed(0))
    if storage := make("format", job.format):
        for path, module in linears(decoder).items():
            swap(decoder, path, storage.pack(dense_OI(module)))
    return assemble(job, decoder)


def noise(vocab: int, lengths: tuple[int, ...]) -> Batch:
    """A batch of random tokens."""
    row = torch.randint(0, vocab, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return Batch(row, row.roll(-1), lengths, row.numel())
