"""Dealing rows of uneven length out evenly: to the ranks of a job, and to the micro-batches of each.

    longest first, each row to the part with the fewest tokens that still has room; then rows of the heaviest and the
    lightest part are exchanged as long as that brings them nearer

Every part gets as many rows as any other, or one less. All ranks know all lengths, since what a step sees is a function
of its number, so each computes the same dealing and takes its own part: nothing is exchanged between them. Packed rows
are even already; this is for rows of one document, and for the last rows of a packing.
Paper: https://arxiv.org/abs/2208.08124 (section 3.3; there the samples travel, which here none has to)
"""

from __future__ import annotations

import numpy as np

# R rows, P parts


def deal(tokens_R: np.ndarray, parts: int) -> list[np.ndarray]:
    """Which rows each of the parts gets, in their order."""
    if len(tokens_R) <= parts or tokens_R.min() == tokens_R.max():
        return np.array_split(np.arange(len(tokens_R)), parts)
    dealt = _longest_first(tokens_R, parts)
    for _ in range(len(tokens_R)):
        if not _exchanged(dealt, tokens_R):
            break
    return [np.array(sorted(rows), dtype=np.int64) for rows in dealt]


def _longest_first(tokens_R: np.ndarray, parts: int) -> list[list[int]]:
    each, more = divmod(len(tokens_R), parts)
    room_P = [each + (part < more) for part in range(parts)]
    total_P, dealt = [0] * parts, [[] for _ in range(parts)]
    for row in np.argsort(-tokens_R, kind="stable").tolist():
        part = min((p for p in range(parts) if len(dealt[p]) < room_P[p]), key=lambda p: (total_P[p], p))
        dealt[part].append(row)
        total_P[part] += int(tokens_R[row])
    return dealt


def _exchanged(dealt: list[list[int]], tokens_R: np.ndarray) -> bool:
    """Exchange one row of the heaviest part for one of the lightest, so that their totals come as near as can be."""
    total_P = [int(tokens_R[rows].sum()) for rows in dealt]
    heavy, light = total_P.index(max(total_P)), total_P.index(min(total_P))
    gap = total_P[heavy] - total_P[light]
    moved_HL = tokens_R[dealt[heavy]][:, None] - tokens_R[dealt[light]]
    left_HL = np.abs(gap - 2 * moved_HL)
    one, other = np.unravel_index(int(left_HL.argmin()), left_HL.shape)
    if left_HL[one, other] >= gap:
        return False
    dealt[heavy][one], dealt[light][other] = dealt[light][other], dealt[heavy][one]
    return True
