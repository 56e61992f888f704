"""Move activations to a second tier, the first tokens' whole, and compute the other tokens' again.

    kept of each block on the device: nothing but what the block under way needs
    moved: the block's input, what attention found, and the share `alpha` of the tokens of everything else

Attention is never run a second time, which is what recomputation spends most on in long contexts; the memory does not
grow with the model's depth. Spends the second tier: a file in the job's folder beside a CPU, pinned host memory beside
a GPU; `alpha` trades its bytes and their way against computing. Left to itself it is what takes the least time by

    forward   max(compute, move)        backward   max(2 compute + (1 - alpha) compute without attention, move)

beside a GPU, whose copies run beside its arithmetic, and by sums in place of maxima beside a CPU, which does both.
Limits: blocks that route tokens to experts move all tokens or none, blocks with dropout all.
Paper: https://arxiv.org/abs/2407.12117 (its plan of addresses is run/layout.py)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from satchel.core.seams import Activations, Card, Run
from satchel.model.attention import Place
from satchel.model.linear import features, linears
from satchel.model.moe import SparseFeedForward
from satchel.train._recompute import draws
from satchel.train._store import Sizes, Store


@dataclass(frozen=True)
class Costs:
    """Of one block, for all of its tokens."""

    whole_bytes: float  # moved in any case
    rest_bytes: float  # moved for the share of tokens that is chosen
    forward_s: float  # a forward pass
    again_s: float  # a second one without attention
    bandwidth: float  # bytes a second to the second tier, and back
    beside: bool  # whether moving runs beside computing

    def seconds(self, alpha: float) -> float:
        """Of a forward and a backward pass, in which the share `alpha` of the tokens is moved."""
        move = (self.whole_bytes + alpha * self.rest_bytes) / self.bandwidth
        passes = self.forward_s, 2 * self.forward_s + (1 - alpha) * self.again_s
        return sum(max(compute, move) if self.beside else compute + move for compute in passes)

    def best(self, room_bytes: float = float("inf")) -> float:
        """The share that takes the least time, of these the largest, where `room_bytes` are left for this block.

        The time is a row of straight lines over `alpha` that bends upwards: the best is at one of its corners.
        """
        most = min(1.0, max(0.0, (room_bytes - self.whole_bytes) / self.rest_bytes)) if self.rest_bytes else 1.0
        move_all, spare = self.rest_bytes / self.bandwidth, -self.whole_bytes / self.bandwidth
        corners = [0.0, most, (self.forward_s + spare) / (move_all or 1)]
        corners.append((2 * self.forward_s + self.again_s + spare) / (move_all + self.again_s or 1))
        inside = [min(max(corner, 0.0), most) for corner in corners]
        return min(inside, key=lambda alpha: (round(self.seconds(alpha), 12), -alpha))


@dataclass(frozen=True, kw_only=True)
class Memo(Activations):
    """MEMO of Zhao et al.: see the file's docstring."""

    card = Card(
        paper="https://arxiv.org/abs/2407.12117",
        saves=("activations",),
        spends=("disk", "compute"),
        fidelity="exact",
        claim="a 7B model at a million tokens on 8 GPUs of 80 GB, 2.42x as fast as Megatron-LM",
        dial=("alpha", 0.0, 1.0),
    )

    alpha: float | None = None  # share of the tokens that are moved; none: by the costs below, [0, 1]
    compute: float = 3e11  # floating-point operations a second of the device, (0, inf)
    bandwidth: float = 1e9  # bytes a second to the second tier and back, (0, inf)
    room: float = 0.0  # GiB that the second tier may take; 0: no limit, [0, inf)

    def __post_init__(self) -> None:
        self.require(self.alpha is None or 0 <= self.alpha <= 1, f"alpha={self.alpha} is outside [0, 1]; 1 moves all")
        for name in ("compute", "bandwidth"):
            self.require(getattr(self, name) > 0, f"{name}={getattr(self, name)} is not above 0; leave it out")
        self.require(self.room >= 0, f"room={self.room} is below 0; 0 sets no limit")

    def start(self, depth: int, home: Path | None = None) -> Callable[[Run, int], Run]:
        """Blocks that share a store of activations."""
        store = Store(partial(self.moved_tokens, depth=depth), home)

        def wrap(block: Run, index: int) -> Run:
            def run(x_BTD: Tensor, place: Place) -> Tensor:
                return store.run(block, index, x_BTD, place)  # pyright: ignore[reportArgumentType] - a decoder's block

            return run

        return wrap

    def moved_tokens(self, sizes: Sizes, depth: int) -> int:
        """How many of a block's tokens are moved."""
        if draws(sizes.block):
            return sizes.tokens
        alpha = self.alpha
        if alpha is None:
            room = self.room * 2**30 / max(depth - 1, 1) if self.room else float("inf")
            alpha = self.costs(sizes).best(room)
        if any(isinstance(module, SparseFeedForward) for module in sizes.block.modules()):
            alpha = round(alpha)
        return round(alpha * sizes.tokens)

    def costs(self, sizes: Sizes) -> Costs:
        """Of a block, by the rates that this method was given."""
        again = 2 * sizes.tokens * sum(a * b for a, b in map(features, linears(sizes.block).values()))
        attention = 2 * _width(sizes.block) * sum(length**2 for length in sizes.lengths)
        forward_s, again_s = (again + attention) / self.compute, again / self.compute
        return Costs(sizes.whole_bytes, sizes.rest_bytes, forward_s, again_s, self.bandwidth, sizes.beside)


def _width(block: nn.Module) -> int:
    """Numbers that all heads of a block find for a token."""
    return next(features(module)[0] for path, module in linears(block).items() if path.endswith("o_proj"))
