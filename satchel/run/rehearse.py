"""Run a job without its memory: the job's own code on fake tensors, in a model of a few layers, extended to all.

    rehearse(job, config).peak.peak_bytes   the most that the job's tensors take, at any instant of it

No method has a memory formula. What is counted is what the code of the job allocates, when, and until when.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from satchel.core.book import make
from satchel.core.job import TrainJob
from satchel.core.seams import Activations, Run, WeightFormat
from satchel.model.batch import Batch
from satchel.model.block import Block
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.linear import linears
from satchel.model.load import fill
from satchel.model.merge import merge
from satchel.model.save import outgoing
from satchel.model.source import Source
from satchel.model.stored import FakeReader, Part
from satchel.run.assemble import DTYPES, Assembly, assemble
from satchel.run.export import PROMPT_TOKENS, require_close, trace
from satchel.run.extend import BACKWARD, FORWARD, Phase, extend, shallow, stand_ins, total_work
from satchel.run.step import Metrics, StepLoss, take_step
from satchel.run.tracker import Segment, Tracker, Work

SPILL = "spill/"  # the kind of work of the operator that moves activations out
LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class Rehearsal:
    """What a job will take of the device that computes, its tensors alone."""

    phases: tuple[Phase, ...]  # in the order of the job
    work: Counter[Work]  # of one optimizer step
    tokens: int  # of one optimizer step
    phase_work: dict[str, Counter[Work]]  # of load, an evaluation of one micro-batch, merge and its check, save
    second_tier_bytes: int = 0  # what a step's forward passes move out of the device at most, and bring back
    step: tuple[Segment, ...] = field(default=(), repr=False, compare=False)  # one, of the layers that were run

    @property
    def peak(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)


class _NoFiles(FakeReader):
    """Reads parameters of any name from nowhere. What the real reader holds beside them is a piece of 128 KiB."""

    def __init__(self) -> None:
        super().__init__({})

    def read(self, part: Part, out: Tensor) -> None:
        """Leaves `out` as it is."""


def rehearse(job: TrainJob, config: ModelConfig, lengths: tuple[int, ...] = (), device: str = "cpu") -> Rehearsal:
    """Rehearse a tune job; it takes about a second, whatever the model's size.

    `lengths` are the documents of its largest micro-batch; without, rows of the full context. Raises UserError where
    the job itself would. Where layers train in turns, peaks are those of the turn with the highest, and work is that of
    an average turn.
    """
    turns = make("optimizer", job.optimizer).together(config.layer_parameters, below=job.adapter == "none")
    found = [_rehearse(job, config, lengths, device, frozenset(turn)) for turn in turns]
    highest = max(found, key=lambda rehearsal: rehearsal.peak.peak_bytes)
    moved = max(rehearsal.second_tier_bytes for rehearsal in found)
    return dataclasses.replace(highest, work=found[0].work, second_tier_bytes=moved)


def _rehearse(
    job: TrainJob, config: ModelConfig, lengths: tuple[int, ...], device: str, trained: frozenset[int]
) -> Rehearsal:
    """Rehearse a job in whose steps these layers train."""
    rows = job.micro_batch or job.batch
    micro_batches = -(-job.batch // rows)
    kinds = _kinds(job, config, trained)
    layers = shallow(kinds)
    stands = stand_ins(kinds, layers)
    with FakeTensorMode(), Tracker("load", "data") as tracker:
        batches = [_batch(lengths or (job.context,) * rows).to(device)] * min(micro_batches, 2)
        assembly = _stage(job, config, layers, trained, device, tracker)
        for _ in range(2):  # the first step makes the optimizer's state, the second lives with it
            tracker.mark("train", "update")
            begin = len(tracker.segments) - 1
            take_step(StepLoss(assembly, lambda: batches, partial(_marked, assembly, tracker)), assembly.lr)
            _label_state(assembly, tracker)
        step = tracker.segments[begin:]
        tracker.mark("evaluate", "step")
        _evaluate(assembly, batches[0])
        _save(job, assembly, tracker)
    update = [s for s in step if s.name[1] == "update"]
    work = total_work([s for s in step if s.name[1] != "update"], stands)
    work = Counter({item: count * micro_batches // len(batches) for item, count in work.items()})
    work.update(_scaled(update, len(trained & set(layers)), len(trained)))
    phases = _phase_work(tracker.segments, stands)
    moved = sum(item.moved_bytes * count for item, count in work.items() if item.kind.startswith(SPILL))
    tokens = job.batch * job.context
    return Rehearsal(tuple(extend(tracker, stands)), work, tokens, phases, moved // micro_batches, tuple(step))


@dataclass(frozen=True)
class _Marking(Activations):
    """An activation policy that marks where each block's forward and backward begin, around the job's own."""

    inner: Activations | None
    tracker: Tracker
    layers: list[int]  # of the deep model, that the blocks are

    def start(self, depth: int, home: Path | None = None) -> Callable[[Run, int], Run]:
        inner = self.inner.start(self.layers[-1] + 1) if self.inner else None

        def wrap(block: Run, index: int) -> Run:
            return self._marked(inner(block, self.layers[index]) if inner else block, index)

        return wrap

    def _marked(self, run: Run, index: int) -> Run:
        def marked(x_BTD: Tensor, *rest: Any) -> Tensor:
            phase = self.tracker.segments[-1].name[0]
            self.tracker.mark(phase, FORWARD, index)
            y_BTD = run(x_BTD, *rest)
            if y_BTD.requires_grad:
                y_BTD.register_hook(lambda _: self.tracker.mark(phase, BACKWARD, index))
            return y_BTD

        return marked


def _kinds(job: TrainJob, config: ModelConfig, trained: frozenset[int]) -> list[tuple[Hashable, ...]]:
    """What differs between the layers of the model or in how the job runs them, which its policy's functions show."""
    policy = make("activations", job.activations)
    wrap = policy.start(config.layers) if policy else lambda block, index: block
    block = Block(config, 0, dtype=DTYPES[job.dtype], device="meta")
    runs = [wrap(block, index) for index in range(config.layers)]
    kinds = (getattr(run, "__code__", type(run)) for run in runs)
    method = make("optimizer", job.optimizer)
    treated = (method.layer_kind(index, config.layers) for index in range(config.layers))
    turns = (index in trained for index in range(config.layers))
    return list(zip(config.layer_kinds, kinds, treated, turns, strict=True))


def _stage(
    job: TrainJob, config: ModelConfig, layers: list[int], trained: frozenset[int], device: str, tracker: Tracker
) -> Assembly:
    """Build and assemble the job with these layers alone, all parameters labelled, every stretch of a step marked."""
    decoder = staged(config, layers, DTYPES[job.dtype], device, make("format", job.format), tracker)
    tracker.mark("load", "assemble")
    assembly = assemble(job, decoder, [place for place, layer in enumerate(layers) if layer in trained])
    for path, module in linears(decoder).items():  # those that surgery has made; all others are known
        if assembly.adapter is None:
            _label(((f"{path}.{name}", t) for name, t in module.state_dict(keep_vars=True).items()), "weights", tracker)
    _label(decoder.named_parameters(), "adapter", tracker)
    tracker.label(assembly.saver.buffers(), "workspace")
    decoder.wrap_blocks(_Marking(make("activations", job.activations), tracker, layers))
    (decoder.model.norm or decoder.lm_head).register_forward_pre_hook(
        lambda *_: tracker.mark(tracker.segments[-1].name[0], "head")
    )
    for name, parameter in (pair for pair in assembly.parameters if pair[1].requires_grad):
        parameter.register_post_accumulate_grad_hook(partial(_label_gradient, name, tracker))
    return assembly


def staged(
    config: ModelConfig,
    layers: list[int],
    dtype: torch.dtype,
    device: str,
    storage: WeightFormat | None,
    tracker: Tracker,
    source: Source | None = None,
    *,
    frozen: bool = False,
) -> Decoder:
    """The decoder with these layers alone, its weights labelled; loaded from nowhere, or as from a source."""
    tracker.mark("load", "model")
    pattern = tuple(config.layer_kinds[index] for index in layers)
    shell = Decoder(dataclasses.replace(config, layers=len(layers), pattern=pattern), dtype, device="meta")
    if source is None:
        parts, reader = {name: Part(name) for name, _ in shell.named_parameters()}, _NoFiles()
    else:
        parts = {name: source.parts[_deep(name, layers)] for name, _ in shell.named_parameters()}
        reader = FakeReader(source.tensors)
    decoder = fill(shell, parts, reader, device, storage, frozen=frozen)
    _label(decoder.state_dict(keep_vars=True).items(), "weights", tracker)
    return decoder


def _deep(name: str, layers: list[int]) -> str:
    """What a parameter of the shallow model is called in the deep one."""
    return LAYER.sub(lambda found: f"layers.{layers[int(found[1])]}.", name)


def _marked(assembly: Assembly, tracker: Tracker, compute: Callable[[], Metrics]) -> Metrics:
    """The computation of a step's loss as segments of its own; around it the optimizer works."""
    _label_state(assembly, tracker)  # what the optimizer holds during the computation only
    tracker.mark("train", "step")
    metrics = compute()
    tracker.mark("train", "update")
    return metrics


def _label(named: Iterable[tuple[str, Tensor]], account: str, tracker: Tracker) -> None:
    for name, tensor in named:
        tracker.label([tensor.data], account, _layer(name))


def _label_gradient(name: str, tracker: Tracker, parameter: nn.Parameter) -> None:
    if parameter.grad is not None:
        tracker.label([parameter.grad], "gradients", _layer(name))


def _label_state(assembly: Assembly, tracker: Tracker) -> None:
    names = {id(parameter): name for name, parameter in assembly.parameters}
    for parameter, state in assembly.optimizer.state.items():
        tensors = [value for value in tree_iter(state) if isinstance(value, Tensor)]
        tracker.label(tensors, "optimizer", _layer(names.get(id(parameter), "")))


def _layer(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found[1]) if found else None


@torch.no_grad()
def _evaluate(assembly: Assembly, batch: Batch) -> None:
    assembly.model.eval()
    assembly.objective.loss(assembly.model, batch, assembly.rng)


def _save(job: TrainJob, assembly: Assembly, tracker: Tracker) -> None:
    """Merge and check as `export` does, if the job does; write what it leaves behind, tensor by tensor, to nowhere."""
    assembly.saver.finish()
    assembly.optimizer.state.clear()
    if assembly.adapter is not None and job.merge:
        prompt_1T = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64)
        tracker.mark("check", "step")
        before = trace(assembly.model, prompt_1T)
        tracker.mark("merge", "step")
        merge(assembly.model)
        _label(assembly.model.state_dict(keep_vars=True).items(), "weights", tracker)
        tracker.mark("check", "step")
        require_close(before, trace(assembly.model, prompt_1T))
        del before
    tracker.mark("save", "step")
    if assembly.adapter is None or job.merge:
        for tensor in outgoing(assembly.model):
            tensor.make()


def _batch(lengths: tuple[int, ...]) -> Batch:
    tokens_1N = torch.zeros(1, sum(lengths), dtype=torch.int64)
    return Batch(tokens_1N, torch.zeros_like(tokens_1N), lengths, sum(lengths))


def _phase_work(segments: list[Segment], stands: list[int]) -> dict[str, Counter[Work]]:
    """What each phase beside the steps computes in the deep model."""
    phases: dict[str, list[Segment]] = {}
    for segment in segments:
        if segment.name[0] != "train":
            phases.setdefault(segment.name[0], []).append(segment)
    forward = {name for name, some in phases.items() if any(segment.name[1] == FORWARD for segment in some)}
    return {
        name: total_work(some, stands) if name in forward else _scaled(some, max(stands) + 1, len(stands))
        for name, some in phases.items()
    }


def _scaled(segments: list[Segment], shown: int, layers: int) -> Counter[Work]:
    """The optimizer's work, or that of load and save, over that many layers: their parameters one after the other."""
    work: Counter[Work] = Counter()
    for segment in segments:
        for item, count in segment.work.items():
            work[item] += count if count < shown else round(count * layers / shown)
    return work
