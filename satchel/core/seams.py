"""The seams: abstract classes that the rooms fill and the loops call. Torch appears in annotations only.

A method is a frozen dataclass whose fields are its knobs. One that changes while it runs makes a state object
(a module, an optimizer, a cache) and keeps nothing itself. At most four abstract methods a seam.

Shapes: B batch, T tokens, N tokens of a flattened batch, D width, I inputs and O outputs of a linear map, R rank.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from satchel.core.card import Card
from satchel.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

Run = Callable[..., "Tensor"]  # a block of a decoder, or what runs in its place: called with x_BTD first


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What every method shares: a card, a slot, a name, and a spelling that parses back."""

    card: ClassVar[Card]
    slot: ClassVar[str]

    @property
    def name(self) -> str:
        """The file's stem, which is the method's name everywhere."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def saves(self) -> tuple[str, ...]:
        """The accounts and costs that it saves of with these knobs; what its card says, unless a knob adds to them."""
        return self.card.saves

    def knobs(self) -> dict[str, Any]:
        """Knob name to value, in the order of declaration."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        """`lora:rank=16,alpha=32`: the name and the knobs that differ from their defaults."""
        changed = [
            f"{f.name}={_spell(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")

    def require(self, holds: bool, complaint: str) -> None:
        """Refuse a knob's value: `galore: rank=0 is below 1; 128 suits a width of 576`. Raises UserError."""
        if not holds:
            raise UserError(f"{self.name}: {complaint}")


def _spell(value: float | str | tuple[object, ...] | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


class WeightFormat(Method):
    """How the matrix of a frozen linear map is stored."""

    slot = "format"
    keeps: ClassVar[bool] = False  # takes matrices that a file holds in blocks as they are

    @abstractmethod
    def pack(self, weight_OI: Tensor) -> nn.Module:
        """A module that maps x_BTI to y_BTO in x's dtype, differentiable in x, and whose `dense()` gives weight_OI.

        Its storage lies in buffers, so that `.to(device)`, state dicts and the rehearsal see it.
        """

    def pack_outer(self, weight_VD: Tensor) -> nn.Module | None:
        """`pack` for the matrix of embeddings or head, where nothing trains; None: it stays as it is."""
        return None

    def keep(self, raw_OB: Tensor, kind: str, inputs: int, dtype: torch.dtype) -> nn.Module:
        """`pack` for a matrix in blocks of a kind, rows of bytes; for a format that `keeps` them."""
        raise NotImplementedError

    def embed(self, packed: nn.Module) -> nn.Module:
        """The embeddings whose matrix `pack_outer` has packed."""
        raise NotImplementedError


class Adapter(Method):
    """What is added to a linear map. The base stays frozen."""

    slot = "adapter"

    @abstractmethod
    def attach(self, path: str, base: nn.Module, rng: torch.Generator | None) -> nn.Module:
        """The module of one adapted map: its `forward(x_NI, base)` gives y_NO, calling `base` on x on the way.

        It may change x before and y after, and write into y in place. `base` here has `in_features`, `out_features`
        and `dense()`, and may be stored in any format; the module keeps no registered reference to it. At birth the
        adapted output equals the base's.
        """

    @abstractmethod
    def delta(self, module: nn.Module, base: nn.Module) -> Tensor | None:
        """What merging adds to the base's dense matrix, [O, I] in float32; None if the adapter cannot be merged."""


class Closure(ABC):
    """What the trainer hands to `optimizer.step(closure)`: torch's own closure, and what an optimizer may ask it.

    Each call computes the loss of the whole step anew, over all its micro-batches and with the same randomness; with
    grad mode on, its gradient too. Once is what torch's optimizers do; one without a backward pass calls it without
    grad mode as often as it wants; one that consumes gradients in hooks finds here when they are whole.
    """

    clip: float = 0.0  # largest gradient norm; 0 turns clipping off
    last: bool = True  # whether the micro-batch under way is the last of this call: its backward completes gradients
    clips: bool = True  # whether it scales what it leaves in `.grad`; an optimizer that does so itself says False

    @abstractmethod
    def __call__(self) -> Tensor:
        """The mean loss, a scalar without graph. Gradients that are left in `.grad` are clipped."""

    def clip_factor(self, norm: Tensor) -> Tensor | float:
        """What to scale a gradient of this global norm by; for an optimizer that leaves none in `.grad`."""
        return (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip > 0 else 1.0


class OptimizerMethod(Method):
    """Turns named parameters into a torch optimizer. Learning rate is set on its groups by the trainer, every step."""

    slot = "optimizer"

    def usual_lr(self, adamw: float, adapted: bool) -> float:
        """The peak learning rate of a job that names none, on adapters or on all weights, where AdamW's is `adamw`."""
        return adamw

    @property
    def undivided(self) -> bool:
        """Whether a step may take least memory with all of its rows at once: gradients that last from one micro-batch
        to the next are then never there together."""
        return False

    def layer_kind(self, layer: int, layers: int) -> Hashable:
        """What sets a layer apart from others in a step: a rehearsal shows one of each kind. As a rule, nothing."""
        return None

    @abstractmethod
    def build(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int
    ) -> torch.optim.Optimizer:
        """An optimizer over the parameters. All of its state lies in `state_dict()`; `seed` starts its randomness.

        The trainer calls `step(closure)` with a `Closure`; in a user's own loop any function that returns the loss
        will do, after `loss.backward()` if grad mode is on. What `step` returns is the loss that is reported. Before it
        changes anything it runs the hooks of `register_step_pre_hook`, as torch's optimizers do.
        """

    def together(self, sizes: Sequence[int], below: bool) -> Sequence[Collection[int]]:
        """Sets of layers that may train at once: the first takes as long as they do on average, and the one of the
        highest peak is among them. All layers, unless they train in turns.

        `sizes` are the parameters of each layer; `below` says whether what lies below the layers trains, so that the
        backward pass goes through all of them whichever train. The rehearsal takes steps with each of the sets.
        """
        return [range(len(sizes))]


class Schedule(Method):
    """How the learning rate moves over a run."""

    slot = "schedule"

    @abstractmethod
    def at(self, step: int, steps: int) -> float:
        """The factor on the peak learning rate, for step `step` (from 0) of `steps`; in [0, 1]."""


@dataclass(frozen=True)
class Domain:
    """What a mixture knows of one source of text."""

    name: str
    share: float  # of all tokens, as the job weighs it or as they lie; those of all domains sum to 1
    pass_steps: float  # optimizer steps that one pass over it would fill by itself


class Mixture(Method):
    """From which sources of text a step draws its rows."""

    slot = "mixture"

    @abstractmethod
    def at(self, step: int, steps: int, domains: Sequence[Domain]) -> tuple[float, ...]:
        """The share of each domain in step `step` (from 0) of `steps`: none negative, their sum 1.

        The loop deals whole rows so that what each domain has given never strays from the sum of its shares.
        Raises UserError where the mixture cannot be made of these domains.
        """

    def epoch_steps(self, domains: Sequence[Domain]) -> float:
        """Optimizer steps of one epoch: a pass over as many tokens as those domains hold that are drawn from."""
        return sum(domain.pass_steps for domain in domains if domain.share > 0)


class Documents(Protocol):
    """The documents of one source that may be trained on, as token ids [T]; read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> np.ndarray: ...


class Selector(Method):
    """Which documents are trained on."""

    slot = "selector"

    @abstractmethod
    def choose(self, sources: Sequence[Documents], seed: int) -> list[np.ndarray]:
        """For each source which of its documents stay, [M] bool. Held-out documents are not among them."""


class Activations(Method):
    """What the forward pass keeps for the backward pass. Most override `wrap` alone; one with a state `start`."""

    slot = "activations"

    def start(self, depth: int, home: Path | None = None) -> Callable[[Run, int], Run]:
        """What wraps the blocks of one model: called with each of `depth` blocks and its index, from 0.

        What the blocks share, or what lasts from step to step, is made here. `home`: a folder for files.
        """
        return partial(self.wrap, depth=depth)

    def wrap(self, block: Run, index: int, depth: int) -> Run:
        """The callable that runs block `index` of `depth` in its place; called as the block is, x_BTD first.

        One that is an `nn.Module` keeps its tensors from step to step: a checkpoint holds them.
        """
        raise NotImplementedError


class Surgery(Method):
    """What is done to a model before it trains: weights in, weights out."""

    slot = "surgery"

    @abstractmethod
    def operate(self, model: nn.Module, rng: torch.Generator) -> None:
        """Change the model in place. Reads no tensor's values on the host: it must run on fake tensors too.

        A map that it puts in the place of another has `in_features`, `out_features`, `dtype` and `dense()`, so that
        what is written afterwards is a plain model.
        """


class Objective(Method):
    """What the run minimises."""

    slot = "objective"

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, rng: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the loss over the batch's `targets` (the trainer divides by their number over the whole optimizer
        step), and sums to report beside it. Makes no host copy of any tensor: it must run on fake tensors too."""


Write = Callable[[Mapping[str, Iterable[memoryview]]], None]  # writes files from their bytes, in pieces


class Saver(ABC):
    """Brings the tensors of checkpoints to the disk. Nobody changes them between `save` and the `settle` after it."""

    @abstractmethod
    def save(self, files: Mapping[str, Mapping[str, Tensor]], write: Write) -> None:
        """Call `write` once, now or in the background, with every file's bytes: those of its tensors in their order.

        It takes them file by file, in the order given; a piece is valid until the next is taken. Raises what an earlier
        save has met in the background.
        """

    @abstractmethod
    def settle(self) -> None:
        """Return as soon as the tensors may change; called before every update. Raises what a save has met."""

    def buffers(self) -> Sequence[Tensor]:
        """What it keeps on the device that computes, booked as workspace."""
        return ()

    @abstractmethod
    def finish(self) -> None:
        """Return when all that was saved is on the disk; hold no memory from then on. Raises what a save has met."""


class Checkpoint(Method):
    """How a checkpoint reaches the disk while the run goes on."""

    slot = "checkpoint"

    @abstractmethod
    def start(self, device: torch.device) -> Saver:
        """The saver of one run, for tensors on `device`."""
