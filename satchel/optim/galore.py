"""GaLore: Adam in a low-dimensional subspace of each matrix's gradient.

    every `gap` steps, for W [O, I] with O >= I: Q [R, I] = the top R right singular vectors of the gradient G
    L = G Q^T [O, R];   D = Adam(L);   W = (1 - lr * weight_decay) (W - lr * scale * D Q)

and mirrored, from the left, where O < I. The moments live on L and go on when Q changes. Matrices of blocks whose
smaller side is above `rank` are projected; embeddings, head, norms and biases take plain Adam.

State is 2 R max(O, I) moments and R min(O, I) for Q, where Adam takes 2 O I. It spends two products with Q a step and
finding Q. `subspace=random` finds it by a randomized range finder with power iterations (Halko et al.), which
catches the gradient's energy within 1% of the exact SVD in a fraction of its time. W holds the full rank throughout.
Paper: https://arxiv.org/abs/2403.03507; range finder: https://arxiv.org/abs/0909.4061
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from satchel.core.seams import Card
from satchel.optim._adam import Adam, AdamStepper
from satchel.optim._shared import adam_, decay_groups, move_, store_name, zero_moments

# O outputs and I inputs of a matrix, R rank, K columns of the sketch

IN_BLOCK = re.compile(r"(^|\.)\w*(attn|attention|mlp|feed_forward|ffn|experts)\w*\.")  # paths of matrices to project
OVERSAMPLED = 16  # columns of the sketch beyond the rank
POWERS = 3  # power iterations
ROWS = 1 << 20  # elements of the full-rank update that are alive at once, or a sixteenth of the matrix if that is more


@dataclass(frozen=True, kw_only=True)
class GaLore(Adam):
    """Gradient low-rank projection around Adam."""

    card = Card(
        paper="https://arxiv.org/abs/2403.03507",
        saves=("optimizer",),
        spends=("compute", "quality"),
        fidelity="approx",
        claim="65.5% less optimizer state at a perplexity close to full rank, pre-training models up to 7B",
        dial=("rank", 4, 1024),
        reference="galore-torch",
        demo={"rank": 4, "gap": 10},
    )

    rank: int = 128  # dimensions of the subspace, 1 or more
    gap: int = 200  # steps between two looks for the subspace, 1 or more
    scale: float = 0.25  # factor on the projected matrices' learning rate, above 0
    subspace: Literal["random", "exact"] = "random"  # randomized range finder, or SVD
    moments: Literal["follow", "fp32", "bf16", "8bit"] = "follow"  # storage of m and v; follow: the parameter's dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rank >= 1, f"rank={self.rank} is below 1; a quarter of the model's width is usual")
        self.require(self.gap >= 1, f"gap={self.gap} is below 1; 200 is usual")
        self.require(self.scale > 0, f"scale={self.scale} is not above 0; 0.25 is usual")
        self.require(self.subspace in ("random", "exact"), f"no subspace '{self.subspace}'; there is random, exact")
        self.require(
            self.moments in ("follow", "fp32", "bf16", "8bit"),
            f"no moments '{self.moments}'; there is follow, fp32, bf16, 8bit",
        )

    def build(self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int) -> GaLoreStepper:
        """A torch optimizer over the parameters. Raises UserError if no matrix would be projected."""
        projected = [pair for pair in named_parameters if self.projects(*pair)]
        sides = [min(p.shape) for name, p in named_parameters if p.ndim == 2 and IN_BLOCK.search(name)]
        self.require(
            bool(projected), f"rank={self.rank} leaves no matrix to project; choose one below {max(sides, default=0)}"
        )
        others = [pair for pair in named_parameters if not self.projects(*pair)]
        groups = [g | {"rank": self.rank} for g in decay_groups(projected, self.weight_decay)]
        groups += [g | {"rank": 0} for g in decay_groups(others, self.weight_decay)]
        own = {"gap": self.gap, "scale": self.scale, "subspace": self.subspace}
        return GaLoreStepper(groups, lr, seed, **self.stepper_knobs(), **own)

    def projects(self, name: str, p: Tensor) -> bool:
        """Whether a parameter is a matrix of a block that is larger than the subspace on both sides."""
        return p.ndim == 2 and min(p.shape) > self.rank and IN_BLOCK.search(name) is not None


class GaLoreStepper(AdamStepper):
    """State of a projected matrix beside Adam's on L: `basis`, Q [R, I], or its mirror image [O, R]."""

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """One step on one parameter, in place; plain Adam where the group has no rank."""
        if not group["rank"]:
            return super().update(p, state, group, seed)
        right = p.shape[0] >= p.shape[1]
        if (state["step"] - 1) % group["gap"] == 0:
            state["basis"] = find_basis(p.grad, group["rank"], right, group["subspace"], seed)
        basis = state["basis"]
        low = p.grad @ basis.T if right else basis.T @ p.grad
        step = self.low_step(low, p, state, group, seed).to(p.dtype)
        rows = max(ROWS // p.shape[1], -(-p.shape[0] // 16))
        keep, flat, bits = 1 - group["lr"] * group["weight_decay"], p.detach().view(-1), state.get("low")
        for number, start in enumerate(range(0, p.shape[0], rows)):
            part, cut = slice(start, start + rows), slice(start * p.shape[1], (start + rows) * p.shape[1])
            full = step[part] @ basis if right else basis[part] @ step
            cut_bits = None if bits is None else bits[cut]
            move_(flat[cut], full.view(-1), cut_bits, group["rounding"], keep, seed + number)

    def low_step(self, low: Tensor, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> Tensor:
        """What the projected gradient moves the matrix by, in the subspace, float32."""
        store = store_name(group["moments"], p)
        if state["step"] == 1:
            state.update(zero_moments(store, low.numel(), p.device), **self.low_bits(p, group))
        unbias1, unbias2 = self.unbias(state, group)
        step = torch.zeros(low.shape, dtype=torch.float32, device=p.device)
        size = group["lr"] * group["scale"] * unbias2 / unbias1
        betas = group["beta1"], group["beta2"]
        adam_(step.view(-1), low.view(-1), self.held(state), store, "nearest", *betas, group["eps"], size, 1.0, seed)
        return step


def find_basis(g_OI: Tensor, rank: int, right: bool, subspace: str, seed: int) -> Tensor:
    """The gradient's top singular vectors in its own dtype: [R, I] from the right, [O, R] from the left."""
    if subspace == "exact":
        u_OK, _, v_KI = torch.linalg.svd(g_OI.float(), full_matrices=False)
        basis = v_KI[:rank] if right else u_OK[:, :rank]
        return basis.to(g_OI.dtype, memory_format=torch.contiguous_format, copy=True)
    basis_IR = random_range(g_OI if right else g_OI.T, rank, seed).to(g_OI.dtype)
    return basis_IR.T.contiguous() if right else basis_IR


def random_range(a_OI: Tensor, rank: int, seed: int) -> Tensor:
    """Nearly the top `rank` right singular vectors of a matrix, [I, R] in float32, orthonormal.

    The products run in the matrix's own dtype: in bfloat16 their noise is far below what the rank cuts off.
    """
    width = min(rank + OVERSAMPLED, *a_OI.shape)
    rng = torch.Generator(a_OI.device).manual_seed(seed)
    sketch_OK = torch.randn(a_OI.shape[0], width, generator=rng, device=a_OI.device).to(a_OI.dtype)
    q_IK = orthonormal(a_OI.T @ sketch_OK)
    for _ in range(POWERS):
        q_IK = orthonormal(a_OI.T @ (a_OI @ q_IK.to(a_OI.dtype)))
    image_OK = (a_OI @ q_IK.to(a_OI.dtype)).float()
    _, turn_KK = torch.linalg.eigh(image_OK.T @ image_OK)  # ascending
    return q_IK @ turn_KK[:, -rank:].flip(1)


def orthonormal(y_IK: Tensor) -> Tensor:
    """An orthonormal basis of the columns, float32."""
    return torch.linalg.qr(y_IK.float())[0]
