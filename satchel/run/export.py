"""What a run leaves behind: an adapter in PEFT's layout, a model in Hugging Face's, and proof that they are the model.

Merging is checked three times. `model/merge` compares every map with the adapted one before the first is changed. Then
the whole merged model must predict what the unmerged one does on a prompt, or the block where they part is named and
nothing is written. Last, what was written is read back and compared bit by bit before it gets its name.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from satchel.adapt import load_peft, save_peft
from satchel.core.errors import ModelError
from satchel.core.job import TrainJob
from satchel.model.adapters import Adapted, adapted
from satchel.model.decoder import Decoder
from satchel.model.linear import dense_OI, is_linear
from satchel.model.load import load
from satchel.model.merge import holds
from satchel.model.merge import merge as merge_maps
from satchel.model.save import save
from satchel.model.source import Source, find_source, load_tokenizer
from satchel.model.tokenizer import Tokenizer
from satchel.run.assemble import Assembly

# T tokens of the prompt, D width, V vocabulary

PROMPT = (
    "The old lighthouse keeper climbed 127 steps every evening. def area(r): return 3.14159 * r ** 2\n"
    "What is the capital of France? The capital of France is Paris, and it lies on the river Seine."
)
PROMPT_TOKENS = 64  # at most, so that a rehearsal knows what the check takes
SLICE = 8  # tokens whose distributions are compared at once
# Mean divergence, nats a token, that rounding the merged matrices may cause; a lost map costs far more.
DIVERGENCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def export(job: TrainJob, assembly: Assembly, source: Source, prompt_1T: Tensor) -> dict[str, str]:
    """Write what was trained into `job.out`, and with `job.merge` the merged model too; the paths, by kind.

    The tokenizer of `source` goes with a model. A merge is checked on the prompt.

    Raises ModelError, naming map or block, rather than write what does nothing or not what was trained. The optimizer's
    state is given up first: a save needs less memory than a step.
    """
    assembly.optimizer.state.clear()
    out, outputs = Path(job.out), {}
    if assembly.adapter is not None:
        require_alive(assembly.model)
        save_peft(assembly.model, out / "adapter", base_name=job.model)
        outputs["adapter"] = str(out / "adapter")
        if not job.merge:
            return outputs
        merge_checked(assembly.model, prompt_1T)
    save_checked(assembly.model, out / "model", source)
    return outputs | {"model": str(out / "model")}


def merge(model: str, adapter: str | Path, out: str | Path) -> Path:
    """Merge the adapter in folder `adapter` into `model` and write the result to the new folder `out`.

    Raises ModelError or UserError if any of them cannot be used, or the result would not be the adapted model.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty; give another folder, or remove this one")
    source = find_source(model)
    wide = any(stored.dtype == "F32" and len(stored.shape) == 2 for stored in source.tensors.values())
    decoder = load(source, torch.float32 if wide else torch.bfloat16)
    load_peft(decoder, adapter)
    merge_checked(decoder, prompt_of(load_tokenizer(source)))
    return save_checked(decoder, out, source)


def prompt_of(tokenizer: Tokenizer) -> Tensor:
    """The first tokens of PROMPT, [1, T]."""
    return torch.tensor([tokenizer.encode(PROMPT, special=True)[:PROMPT_TOKENS]])


@torch.no_grad()
def require_alive(model: nn.Module) -> None:
    """Refuse an adapter that changes nothing anywhere, or is not finite somewhere. Raises ModelError."""
    places = dict(adapted(model))
    for path, place in places.items():
        for name, parameter in place.adapters.named_parameters():
            if not torch.linalg.vector_norm(parameter).isfinite():
                raise ModelError(f"{path}: '{name}' is not finite; the training diverged, take an earlier checkpoint")
    if not any(_changes(place) for place in places.values()):
        raise ModelError(f"the adapter changes nothing, at {next(iter(places))} or any other map; train it for longer")


def _changes(place: Adapted) -> bool:
    deltas = (method.delta(place.adapters[name], place.base) for name, method in place.methods.items())
    return any(delta_OI is None or bool(delta_OI.any()) for delta_OI in deltas)


def merge_checked(decoder: Decoder, tokens_1T: Tensor) -> None:
    """Merge all adapters of `decoder` in place.

    Raises ModelError, naming the block, if it then predicts other tokens than before by more than rounding allows.
    """
    before = trace(decoder, tokens_1T)
    merge_maps(decoder)
    require_close(before, trace(decoder, tokens_1T))


@dataclass(frozen=True)
class Trace:
    """What a decoder made of a prompt."""

    logits_TV: Tensor  # in the model's dtype
    blocks: tuple[Tensor, ...]  # what each block put out, [T, D]


@torch.no_grad()
def trace(decoder: Decoder, tokens_1T: Tensor) -> Trace:
    """Run a prompt in evaluation mode and keep what each block put out."""
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, x_BTD: blocks.append(x_BTD[0])) for block in decoder.layers]
    training = decoder.training
    decoder.eval()
    try:
        logits_BTV = decoder(tokens_1T.to(decoder.lm_head.weight.device))
    finally:
        decoder.train(training)
        for hook in hooks:
            hook.remove()
    return Trace(logits_BTV[0], tuple(blocks))


def require_close(before: Trace, after: Trace) -> None:
    """Raises ModelError, naming the block where they part, if their predictions differ by more than rounding does."""
    limit = DIVERGENCE[before.logits_TV.dtype]
    gap = divergence(before.logits_TV, after.logits_TV)
    if not holds(gap <= limit):
        raise ModelError(
            f"the merged model diverges from the adapted one by {float(gap):.1e} nats a token, more than rounding's "
            f"{limit:.0e}; they part at {first_apart(before, after)}. Nothing was written; use the adapter by itself"
        )


def divergence(ours_TV: Tensor, theirs_TV: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of their next-token distributions from ours, nats a token, a float32 scalar."""
    total = torch.zeros((), device=ours_TV.device)
    for ours, theirs in zip(ours_TV.split(SLICE), theirs_TV.split(SLICE), strict=True):
        ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        total += theirs.sub_(ours).mul_(ours.exp_()).sum().neg_()
    return total / len(ours_TV)


def first_apart(before: Trace, after: Trace) -> str:
    """The block whose output moved most beyond that of the block before it."""
    pairs = zip(before.blocks, after.blocks, strict=True)
    gaps = [float((b - a).float().norm() / b.float().norm()) for b, a in pairs]
    jumps = [gap - below for gap, below in zip(gaps, [0.0, *gaps], strict=False)]
    if not jumps or max(jumps) <= 0:
        return "the head"
    index = jumps.index(max(jumps))
    return f"model.layers.{index}, whose output is off by {gaps[index]:.1e}"


def save_checked(decoder: Decoder, folder: Path, source: Source) -> Path:
    """Write `decoder` to `folder`, which is replaced once the new one was read back and found to be equal.

    Raises ModelError, naming the tensor, if it is not.
    """
    _require_finite(decoder)
    draft, old = folder.with_name(f".{folder.name}.draft"), folder.with_name(f".{folder.name}.old")
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        save(decoder, draft, tokenizer_from=source)
        require_equal(decoder, draft)
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
    finally:
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def require_equal(decoder: Decoder, folder: Path) -> None:
    """Raises ModelError, naming the tensor, unless `folder` holds the very weights of `decoder`."""
    saved = find_source(str(folder))
    with saved.reader() as reader:
        for name, part in saved.parts.items():
            path, _, kind = name.rpartition(".")
            module = decoder.get_submodule(path)
            ours = dense_OI(module) if kind == "weight" and is_linear(module) else getattr(module, kind).detach()
            theirs = torch.empty_like(ours, device="cpu", memory_format=torch.contiguous_format)
            reader.read(part, theirs)
            if not torch.equal(ours.cpu(), theirs):
                raise ModelError(f"{name}: what was written is not what was trained; the disk or the save is at fault")


@torch.no_grad()
def _require_finite(decoder: Decoder) -> None:
    for name, parameter in decoder.named_parameters():
        if not torch.linalg.vector_norm(parameter).isfinite():
            raise ModelError(f"{name} is not finite; the training diverged, take an earlier checkpoint")
