"""What other estimators say of the rows of bench/plan: each through its own functions, offline.

Every answer is bytes `[of tensors, with the tool's CUDA overhead]`, or a string that says why the row is outside of the
tool's scope. They estimate transformers + PEFT on a GPU, not this code: what counts is what they would tell a person
who asks how much memory such a job takes.
"""

from collections.abc import Callable

import torch

from satchel.core.book import make
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder

Answer = list[float] | str
MIB, GIB = 1 << 20, 1 << 30
UNGATED = "knows gated feed-forwards only"


def accelerate(job: TuneJob, config: ModelConfig) -> Answer:
    """`accelerate estimate-memory`: its figure for training with Adam; under an adapter the size of the weights."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    size, _ = calculate_maximum_sizes(Decoder(config, torch.float32, device="meta"))
    if job.adapter == "none":
        if job.optimizer != "adamw":
            return f"knows no {_method(job.optimizer)}"
        usage = estimate_training_usage(size, "float16" if job.dtype == "bf16" else "float32")
        return [float(max(usage.values()))] * 2
    stored = {"none": job.dtype, "int8": "int8", "nf4": "4 bits", "int4": "4 bits"}[_method(job.format)]
    return [size * {"fp32": 1, "bf16": 0.5, "int8": 0.25, "4 bits": 0.125}[stored]] * 2


def fitcheck(job: TuneJob, config: ModelConfig) -> Answer:
    """fitcheck-llm's report for its largest GPU, with flash attention (torch's own attention is of that kind)."""
    import fitcheck as peer
    from fitcheck.memory.lora import LORA_TARGETS_FULL

    if why := _outside(job, config, formats=("none", "nf4"), optimizers=("adamw", "adamw8bit")):
        return why
    shape = peer.ModelConfig(
        name=config.family,
        num_params=config.parameters,
        hidden_size=config.width,
        num_layers=config.layers,
        num_attention_heads=config.heads,
        num_kv_heads=config.kv_heads,
        intermediate_size=config.hidden,
        vocab_size=config.vocab,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tied,
    )
    training = peer.TrainingConfig(
        precision=job.dtype,
        quantization=job.format,
        optimizer=job.optimizer,
        batch_size=job.micro_batch or job.batch,
        seq_len=job.context,
        lora_rank=None if job.adapter == "none" else _rank(job),
        lora_targets=list(LORA_TARGETS_FULL),
        grad_checkpoint=job.activations == "full",
        flash_attn=True,
    )
    report = peer.estimate(shape, training, peer.get_gpu("h200"))
    return [(report.total_mib - report.overhead_mib) * MIB, report.total_mib * MIB]


def fitscout(job: TuneJob, config: ModelConfig) -> Answer:
    """fitscout's estimate, not calibrated."""
    from fitscout import ModelProfile
    from fitscout.memory.estimator import estimate_memory

    if why := _outside(job, config, formats=("none", "nf4"), optimizers=("adamw", "adamw8bit")):
        return why
    bytes_each = 2 if job.dtype == "bf16" else 4
    profile = ModelProfile(
        params=config.parameters,
        num_layers=config.layers,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_kv_heads=config.kv_heads,
        intermediate_size=config.hidden,
        vocab_size=config.vocab,
        tie_word_embeddings=config.tied,
        dtype_bytes=bytes_each,
    )
    estimate = estimate_memory(
        profile,
        method="full" if job.adapter == "none" else "lora" if job.format == "none" else "qlora",
        micro_batch=job.micro_batch or job.batch,
        seq_len=job.context,
        grad_ckpt=job.activations == "full",
        opt_8bit=job.optimizer == "adamw8bit",
        lora_rank=8 if job.adapter == "none" else _rank(job),
        grad_dtype_bytes=bytes_each,
    )
    return [(estimate.total_gb - estimate.overhead_gb) * GIB, estimate.total_gb * GIB]


PEERS: dict[str, Callable[[TuneJob, ModelConfig], Answer]] = {
    "accelerate": accelerate,
    "fitcheck-llm": fitcheck,
    "fitscout": fitscout,
}


def _outside(job: TuneJob, config: ModelConfig, formats: tuple[str, ...], optimizers: tuple[str, ...]) -> str:
    """Why a row is outside of a tool's scope; empty if it is not."""
    known = {
        "adapter": ("none", "lora", "rslora"),
        "format": formats,
        "optimizer": optimizers,
        "activations": ("none", "full"),
    }
    for slot, names in known.items():
        if _method(getattr(job, slot)) not in names:
            return f"knows no {_method(getattr(job, slot))}"
    return "" if config.gated else UNGATED


def _method(spelling: str) -> str:
    return spelling.partition(":")[0]


def _rank(job: TuneJob) -> int:
    return make("adapter", job.adapter).rank
