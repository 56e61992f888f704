"""Subspaces of a matrix's gradient, and which matrices are projected.

A subspace has a basis Q, [R, I] with orthonormal rows for a matrix [O, I] with O >= I, else its mirror image [O, R]:

    low = G Q^T [O, R]        step = low Q            and mirrored:    low = Q^T G [R, I]        step = Q low
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from satchel.optim._shared import SLICE_DEVICE

# O outputs and I inputs of a matrix, R rank, K columns of the sketch

IN_BLOCK = re.compile(r"(^|\.)\w*(attn|attention|mlp|feed_forward|ffn|experts)\w*\.")  # paths of matrices to project
OVERSAMPLED = 16  # columns of the sketch beyond the rank
POWERS = 3  # power iterations
PART = {"cpu": 1 << 18}  # elements of the full-rank update that are alive at once: 1 MiB in float32 stays in the caches
PARTS = 16  # of a matrix at most: Python runs once for each


def in_block(name: str, p: Tensor) -> bool:
    """Whether a parameter is a matrix of an attention or feed-forward block."""
    return p.ndim == 2 and IN_BLOCK.search(name) is not None


def row_parts(a_OI: Tensor) -> Iterator[slice]:
    """Cuts the rows of a matrix into parts of bounded size, at most PARTS."""
    outputs, inputs = a_OI.shape
    rows = max(PART.get(a_OI.device.type, SLICE_DEVICE) // inputs, -(-outputs // PARTS))
    return (slice(start, min(start + rows, outputs)) for start in range(0, outputs, rows))


def is_tall(p: Tensor) -> bool:
    """Whether a matrix is projected from the right."""
    return p.shape[0] >= p.shape[1]


def lower(a_OI: Tensor, basis: Tensor) -> Tensor:
    """A matrix's coordinates in the subspace."""
    return a_OI @ basis.T if is_tall(a_OI) else basis.T @ a_OI


def raised(low: Tensor, basis: Tensor, tall: bool, part: slice) -> Tensor:
    """Rows of the matrix that has these coordinates."""
    return low[part] @ basis if tall else basis[part] @ low


def find_basis(g_OI: Tensor, rank: int, subspace: str, seed: int) -> Tensor:
    """The gradient's top singular vectors in its own dtype: [R, I] if it is tall, else [O, R]."""
    tall = is_tall(g_OI)
    if subspace == "exact":
        u_OK, _, v_KI = torch.linalg.svd(g_OI.float(), full_matrices=False)
        basis = v_KI[:rank] if tall else u_OK[:, :rank]
        return basis.to(g_OI.dtype, memory_format=torch.contiguous_format, copy=True)
    basis_IR = random_range(g_OI if tall else g_OI.T, rank, seed).to(g_OI.dtype)
    return basis_IR.T.contiguous() if tall else basis_IR


def random_range(a_OI: Tensor, rank: int, seed: int) -> Tensor:
    """Nearly the top `rank` right singular vectors of a matrix, [I, R] in float32, orthonormal.

    A randomized range finder (Halko et al., https://arxiv.org/abs/0909.4061). The products run in the matrix's own
    dtype: in bfloat16 their noise is far below what the rank cuts off.
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
