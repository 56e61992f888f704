"""Rotary positions: their parameters as configurations write them, and the tables of cosines and sines.

    angle[t, r] = t * frequency[r],   frequency[r] = theta ** (-2 r / R),   r < R / 2

A scaling stretches the frequencies so that longer contexts stay within the angles seen in training: `linear` and
`dynamic` [1], `llama3` [2], `yarn` [3] and `longrope` [4]. Tables are made per call: T x R/2 numbers each.
Frequencies are float32, as in the implementations that the checkpoints come from.
[1] https://arxiv.org/abs/2306.15595  [2] https://arxiv.org/abs/2407.21783
[3] https://arxiv.org/abs/2309.00071  [4] https://arxiv.org/abs/2402.13753
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from satchel.core.errors import ModelError, UnknownName

# T positions, R rotated dimensions of a head

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_SPELLINGS = {"su": "longrope", "": "default"}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Parameters of a rotary embedding; hashable, so that layers that share one share its tables."""

    kind: str = "default"  # one of KINDS
    theta: float = 10_000.0  # longest wavelength / 2 pi, positions
    share: float = 1.0  # part of a head's dimensions that rotates, (0, 1]
    factor: float | None = None  # how far the context is stretched; None: context / original_context
    context: int = 0  # longest sequence of the model, tokens
    original_context: int = 0  # longest sequence before stretching, tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which a dimension is left alone
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is stretched in full
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    attention_factor: float | None = None  # yarn, longrope: factor on cosines and sines; None: the paper's
    short_factor: tuple[float, ...] = ()  # longrope: divisors within original_context
    long_factor: tuple[float, ...] = ()  # longrope: divisors beyond it

    @property
    def stretch(self) -> float:
        """How many times longer than the original context, >= 0."""
        return self.context / self.original_context if self.factor is None else self.factor


def read_rope(
    hf: Mapping[str, Any], *, parameters: Mapping[str, Any] | None = None, theta: float = 10_000.0, share: float = 1.0
) -> Rope:
    """The Rope of a Hugging Face configuration, in the layout of transformers 5 (`rope_parameters`) or of 4
    (`rope_theta`, `rope_scaling`). `parameters` overrides where they are taken from; `theta` and `share` are the
    family's defaults. Raises UnknownName for a scaling that is not among KINDS, ModelError for one that is incomplete.
    """
    found = dict(parameters if parameters is not None else hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = found.get("rope_type") or found.get("type") or "default"
    kind = _SPELLINGS.get(kind, kind)
    if kind not in KINDS:
        raise UnknownName("rope scaling", kind, KINDS, where="config.json")
    context = hf["max_position_embeddings"]
    original = hf.get("original_max_position_embeddings") or found.get("original_max_position_embeddings") or context
    known = {name: found[name] for name in Rope.__dataclass_fields__ if found.get(name) is not None}
    known |= {name: tuple(found[name]) for name in ("short_factor", "long_factor") if found.get(name)}
    known |= {
        "kind": kind,
        "theta": float(found.get("rope_theta") or hf.get("rope_theta") or theta),
        "share": float(found.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or share),
        "context": context,
        "original_context": original,
    }
    return _complete(Rope(**known))


def _complete(rope: Rope) -> Rope:
    if rope.kind in ("linear", "dynamic", "llama3") and rope.factor is None:
        raise ModelError(f"config.json: rope scaling '{rope.kind}' has no 'factor'; add one, such as 8.0")
    if rope.kind == "longrope" and not (rope.short_factor and rope.long_factor):
        raise ModelError("config.json: rope scaling 'longrope' needs 'short_factor' and 'long_factor'")
    return rope


def rope_tables(
    rope: Rope, head_dim: int, position_T: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [T, R/2] in `dtype`, for positions of sequences of at most `length` tokens.

    `length` matters to `dynamic` and `longrope`, whose frequencies depend on how long the sequence is.
    """
    frequency_R, factor = frequencies(rope, head_dim, length, position_T.device)
    cos_TR, sin_TR = tables_of(frequency_R, factor, position_T)
    return cos_TR.to(dtype), sin_TR.to(dtype)


def tables_of(frequency_R: Tensor, factor: float, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """`rope_tables` in float32, by frequencies that are known."""
    angle_TR = position_T.float()[:, None] * frequency_R
    return angle_TR.cos() * factor, angle_TR.sin() * factor


def frequencies(rope: Rope, head_dim: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    """Angles from one position to the next, [R/2] in float32, and what cosines and sines are multiplied by."""
    return _SCALINGS[rope.kind](rope, int(head_dim * rope.share), length, device)


def _exponents(rotated: int, device: torch.device) -> Tensor:
    return torch.arange(0, rotated, 2, device=device).float() / rotated


def _default(rope: Rope, rotated: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    return 1.0 / rope.theta ** _exponents(rotated, device), 1.0


def _linear(rope: Rope, rotated: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    return _default(rope, rotated, length, device)[0] / rope.stretch, 1.0


def _dynamic(rope: Rope, rotated: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    over = max(length, rope.context) / rope.context
    theta = rope.theta * (rope.stretch * over - (rope.stretch - 1)) ** (rotated / (rotated - 2))
    return 1.0 / theta ** _exponents(rotated, device), 1.0


def _llama3(rope: Rope, rotated: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    frequency_R = _default(rope, rotated, length, device)[0]
    turns_R = rope.original_context * frequency_R / (2 * math.pi)  # over the original context
    smooth_R = (turns_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequency_R / rope.stretch, frequency_R, smooth_R.clamp(0, 1)), 1.0


def _yarn(rope: Rope, rotated: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    def dimension(turns: float) -> float:  # that makes so many turns over the original context
        return rotated * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp_R = (torch.arange(rotated // 2, device=device).float() - low) / max(high - low, 0.001)
    frequency_R = _default(rope, rotated, length, device)[0]
    return torch.lerp(frequency_R, frequency_R / rope.stretch, ramp_R.clamp(0, 1)), _yarn_factor(rope)


def _yarn_factor(rope: Rope) -> float:
    def magnitude(scale: float = 1.0) -> float:
        return 1.0 if rope.stretch <= 1 else 0.1 * scale * math.log(rope.stretch) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude()


def _longrope(rope: Rope, rotated: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    divisors = rope.long_factor if length > rope.original_context else rope.short_factor
    if len(divisors) != rotated // 2:
        raise ModelError(f"config.json: longrope has {len(divisors)} factors for {rotated // 2} pairs of dimensions")
    frequency_R = _default(rope, rotated, length, device)[0] / torch.tensor(divisors, device=device)
    if rope.attention_factor is not None:
        return frequency_R, rope.attention_factor
    stretch, original = rope.stretch, rope.original_context
    return frequency_R, 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))


_SCALINGS: dict[str, Callable[[Rope, int, int, torch.device], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
