"""Names and layouts of tensors in Hugging Face checkpoints, against this house's, as tables of rules.

A rule says that one tensor on disk holds one or more of ours, and how it is split and fused. Templates name the parts
that run: {i} the layer, {e} the expert, {p} weight or bias, {any} whatever. The first rule that matches holds, in both
directions, so that what is read can be written back. Families that need no rule of their own have Llama's names.

    house_recipes(config, names on disk)    for each of our parameters, what to read and how to make it
    hf_recipes(config, our names)           for each tensor to write, which of ours it takes and how

Both are lazy: a loader goes parameter by parameter and never holds two copies. `make` gives views where it can.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from satchel.core.errors import ModelError
from satchel.model.config import ModelConfig

# O outputs, I inputs of a linear map, H heads, E head dim


class Layout(NamedTuple):
    """How one tensor on disk holds ours."""

    split: Callable[[ModelConfig, Tensor], Sequence[Tensor]]
    fuse: Callable[[ModelConfig, Sequence[Tensor]], Tensor]


class Rule(NamedTuple):
    """One tensor on disk, ours that it holds, and the layout; names are templates."""

    hf: str
    house: tuple[str, ...]
    layout: Layout


class Recipe(NamedTuple):
    """How to make one tensor: read `sources`, hand them to `make` in that order."""

    sources: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor]


def _flip(t: Tensor) -> Tensor:
    return t.T if t.dim() == 2 else t  # biases lie the same both ways


def _qkv_rows(config: ModelConfig, fused: Tensor) -> Sequence[Tensor]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return fused.split((q, kv, kv))


def _by_head(config: ModelConfig, fused: Tensor) -> Sequence[Tensor]:
    """Rows lie as [H, 3, E]: query, key and value of the first head, then of the second."""
    return [t.flatten(0, 1) for t in fused.unflatten(0, (config.heads, 3, config.head_dim)).unbind(1)]


def _fuse_by_head(config: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.unflatten(0, (config.heads, config.head_dim)) for t in parts], 1).flatten(0, 2)


SAME = Layout(lambda c, t: (t,), lambda c, parts: parts[0])
FLIPPED = Layout(lambda c, t: (_flip(t),), lambda c, parts: _flip(parts[0]))
HALVES = Layout(lambda c, t: t.chunk(2), lambda c, parts: torch.cat(list(parts)))
QKV_ROWS = Layout(_qkv_rows, lambda c, parts: torch.cat(list(parts)))
QKV_FLIPPED = Layout(lambda c, t: _flip(t).chunk(3), lambda c, parts: _flip(torch.cat(list(parts))))
QKV_BY_HEAD = Layout(_by_head, _fuse_by_head)

_LAYER = "model.layers.{i}."
_QKV = tuple(_LAYER + f"self_attn.{x}_proj.{{p}}" for x in "qkv")
_NORMS = ("input_layernorm.{p}", "post_attention_layernorm.{p}")  # of a layer


def _rename(hf: str, house: str, layout: Layout = SAME) -> Rule:
    return Rule(hf, (house,), layout)


def _renames(hf: str, house: str, names: dict[str, str], layout: Layout = SAME) -> list[Rule]:
    """A rule for each of `names`, theirs to ours, below a stem of each side."""
    return [_rename(hf + theirs, house + ours, layout) for theirs, ours in names.items()]


_IDENTITY = _rename("{any}", "{any}")

_PHI3 = (
    Rule(_LAYER + "self_attn.qkv_proj.{p}", _QKV, QKV_ROWS),
    Rule(_LAYER + "mlp.gate_up_proj.{p}", (_LAYER + "mlp.gate_proj.{p}", _LAYER + "mlp.up_proj.{p}"), HALVES),
    _IDENTITY,
)

_EXPERT = {"w1.{p}": "gate_proj.{p}", "w2.{p}": "down_proj.{p}", "w3.{p}": "up_proj.{p}"}
_MIXTRAL = (
    _rename(_LAYER + "block_sparse_moe.gate.{p}", _LAYER + "mlp.gate.{p}"),
    *_renames(_LAYER + "block_sparse_moe.experts.{e}.", _LAYER + "mlp.experts.{e}.", _EXPERT),
    _IDENTITY,
)

_GPT2_MAPS = {
    "attn.c_proj.{p}": "self_attn.o_proj.{p}",
    "mlp.c_fc.{p}": "mlp.up_proj.{p}",
    "mlp.c_proj.{p}": "mlp.down_proj.{p}",
}
_GPT2 = (
    _rename("transformer.wte.weight", "model.embed_tokens.weight"),
    _rename("transformer.wpe.weight", "model.embed_positions.weight"),
    _rename("transformer.ln_f.{p}", "model.norm.{p}"),
    *_renames("transformer.h.{i}.", _LAYER, {"ln_1.{p}": _NORMS[0], "ln_2.{p}": _NORMS[1]}),
    Rule("transformer.h.{i}.attn.c_attn.{p}", _QKV, QKV_FLIPPED),
    *_renames("transformer.h.{i}.", _LAYER, _GPT2_MAPS, FLIPPED),
    _rename("lm_head.weight", "lm_head.weight"),
)

_OPT_PARTS = {
    "embed_tokens.weight": "embed_tokens.weight",
    "embed_positions.weight": "embed_positions.weight",
    "project_in.weight": "project_in.weight",
    "project_out.weight": "project_out.weight",
    "final_layer_norm.{p}": "norm.{p}",
}
_OPT_LAYER = {
    "self_attn_layer_norm.{p}": _NORMS[0],
    "final_layer_norm.{p}": _NORMS[1],
    **{name: name for name in (f"self_attn.{x}_proj.{{p}}" for x in "qkv")},
    "self_attn.out_proj.{p}": "self_attn.o_proj.{p}",
    "fc1.{p}": "mlp.up_proj.{p}",
    "fc2.{p}": "mlp.down_proj.{p}",
}
_OPT = (
    *_renames("model.decoder.", "model.", _OPT_PARTS),
    *_renames("model.decoder.layers.{i}.", _LAYER, _OPT_LAYER),
    _rename("lm_head.weight", "lm_head.weight"),
)

_NEOX_LAYER = {
    "input_layernorm.{p}": _NORMS[0],
    "post_attention_layernorm.{p}": _NORMS[1],
    "attention.dense.{p}": "self_attn.o_proj.{p}",
    "mlp.dense_h_to_4h.{p}": "mlp.up_proj.{p}",
    "mlp.dense_4h_to_h.{p}": "mlp.down_proj.{p}",
}
_GPT_NEOX = (
    _rename("gpt_neox.embed_in.weight", "model.embed_tokens.weight"),
    _rename("gpt_neox.final_layer_norm.{p}", "model.norm.{p}"),
    _rename("embed_out.weight", "lm_head.weight"),
    _rename("lm_head.weight", "lm_head.weight"),
    Rule("gpt_neox.layers.{i}.attention.query_key_value.{p}", _QKV, QKV_BY_HEAD),
    *_renames("gpt_neox.layers.{i}.", _LAYER, _NEOX_LAYER),
)

RULES = {"phi3": _PHI3, "mixtral": _MIXTRAL, "gpt2": _GPT2, "opt": _OPT, "gpt_neox": _GPT_NEOX}

# Other spellings of whole checkpoints: saved without their head, or with the half that sees.
ALIASES = {
    "gpt2": ((r"^(?!transformer\.|lm_head)", "transformer."),),
    "opt": ((r"^decoder\.", "model.decoder."),),
    "gemma3_text": ((r"^(model\.language_model|language_model\.model)\.", "model."), (r"^language_model\.", "")),
}
# Buffers and foreign parts that hold nothing of ours.
IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$|^(model\.)?(vision_tower|multi_modal_projector)\."
)
_PARTS = {"{i}": r"(?P<i>\d+)", "{e}": r"(?P<e>\d+)", "{p}": r"(?P<p>weight|bias)", "{any}": r"(?P<any>.+)"}


def house_recipes(config: ModelConfig, hf_names: Iterable[str]) -> dict[str, Recipe]:
    """For each of our parameters that the tensors on disk hold, how to make it; a tied head is left out.

    Raises ModelError for a tensor that the family has no place for.
    """
    recipes = {}
    for on_disk in hf_names:
        if found := _held(config, on_disk):
            for place, name in enumerate(found[1]):
                recipes[name] = Recipe((on_disk,), _part(config, found[0].layout, place))
    if config.tied:
        recipes.pop("lm_head.weight", None)
    return recipes


def to_house(config: ModelConfig, hf_name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors that one tensor on disk holds, for readers that stream a file."""
    found = _held(config, hf_name)
    if found:
        yield from zip(found[1], found[0].layout.split(config, tensor), strict=True)


def hf_recipes(config: ModelConfig, house_names: Iterable[str]) -> dict[str, Recipe]:
    """For each tensor to write, which of ours it takes and how; a tied head is left out."""
    recipes = {}
    for name in house_names:
        if config.tied and name == "lm_head.weight":
            continue
        rule, parts = _holder(config, name)
        sources = tuple(template.format(**parts) for template in rule.house)
        recipes[rule.hf.format(**parts)] = Recipe(sources, _whole(config, rule.layout))
    return recipes


def _part(config: ModelConfig, layout: Layout, place: int) -> Callable[[Sequence[Tensor]], Tensor]:
    return lambda tensors: layout.split(config, tensors[0])[place]


def _whole(config: ModelConfig, layout: Layout) -> Callable[[Sequence[Tensor]], Tensor]:
    return lambda tensors: layout.fuse(config, tensors)


def _held(config: ModelConfig, hf_name: str) -> tuple[Rule, tuple[str, ...]] | None:
    """The rule for a tensor on disk, and our names that it holds; None for what holds nothing of ours."""
    if IGNORED.search(hf_name):
        return None
    for spelling, ours in ALIASES.get(config.family, ()):
        hf_name = re.sub(spelling, ours, hf_name)
    for rule in RULES.get(config.family, (_IDENTITY,)):
        if match := _pattern(rule.hf).fullmatch(hf_name):
            return rule, tuple(template.format(**match.groupdict()) for template in rule.house)
    raise ModelError(f"a {config.family} model has no tensor '{hf_name}'; is config.json of this checkpoint?")


def _holder(config: ModelConfig, name: str) -> tuple[Rule, dict[str, str]]:
    """The rule by which one of our parameters is written, and what its templates' parts stand for."""
    for rule in RULES.get(config.family, (_IDENTITY,)):
        for template in rule.house:
            if match := _pattern(template).fullmatch(name):
                return rule, match.groupdict()
    raise ModelError(f"a {config.family} checkpoint has no place for '{name}'; only the base model's weights are saved")


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for part, expression in _PARTS.items():
        pattern = pattern.replace(part, expression)
    return re.compile(pattern)
