"""A decoder's blocks as one operator, where nothing stands between them.

Most of a step of few tokens is reading the weights; what lies between, some hundred small operators, would take longer.
native/stack.cpp does all blocks in one call: the same as `Block`, in float32 between its products. It takes blocks of
the Llama kind, norms before both halves, a gated feed-forward, all maps in tiles, over pages of keys and values. A map
that was swapped for another, a hook, an adapter on one of the rows: then the blocks run one by one.
"""

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from satchel.model.bank import Banked
from satchel.model.block import ROLES, Block
from satchel.model.feedforward import FeedForward
from satchel.model.norm import RMSNorm
from satchel.model.paged import Row
from satchel.model.rope import Rope, frequencies, tables_of
from satchel.model.tiles import ROWS, TiledLinear
from satchel.native import stack as native

if TYPE_CHECKING:
    from satchel.model.decoder import Decoder

# N rows of a step, D width, T tables, R half of the rotated dimensions

PATHS = {f"self_attn.{name}_proj": name for name in "qkvo"} | {
    f"mlp.{name}_proj": name for name in ("gate", "up", "down")
}
NORMS = {"input_layernorm": "into_attention", "post_attention_layernorm": "into_mlp"}
NORMS |= {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}


class Stack:
    """The blocks of one decoder."""

    def __init__(self, decoder: "Decoder", kernel: native.Kernel) -> None:
        self.config, self.kernel = decoder.config, kernel
        self.blocks: list[Any] = list(decoder.layers)
        self.bf16 = next(maps(self.blocks[0])).kind == "BF16"  # of all
        self.ropes: list[Rope] = list({b.self_attn.rope: None for b in self.blocks if b.self_attn.rope})
        links = [link for block in self.blocks for link in _links(block)]
        self._holders, self._names, self._things = map(tuple, zip(*links, strict=True))
        self._banked = next((m for m in self._things if isinstance(m, Banked)), None)
        self._kept: list[Tensor] = []
        self._frequencies: dict[int, list[tuple[Tensor, float]]] = {}  # by the longest sequence that there may be
        self._layers: Any = None

    def untouched(self) -> bool:
        """Whether all that was put together is still in its place."""
        return all(map(operator.is_, map(dict.get, self._holders, self._names), self._things))

    def idle(self) -> bool:
        """Whether no row has an adapter now."""
        return self._banked is None or self._banked.idle

    def __call__(self, x_BTD: Tensor, row: Row) -> Tensor:
        """What the blocks make of [1, N, D]. Rows of filler become zeros."""
        rows, bfloat16 = x_BTD.shape[1] - row.filler, x_BTD.dtype == torch.bfloat16
        table_XNR = self._tables(row, rows)
        y_BTD = torch.zeros_like(x_BTD)
        call = self._call(row, rows, table_XNR.shape[-1])
        room = torch.empty(self.kernel.room_bytes(call, bfloat16), dtype=torch.uint8)
        if isinstance(x_BTD, FakeTensor):
            return y_BTD
        tensors = {"x": x_BTD.contiguous(), "y": y_BTD, "tables": table_XNR, "pool": row.pages.data, "room": room}
        tensors |= {"pages": row.pages_M, **row.bounds, **row.sight}
        for name, tensor in tensors.items():
            setattr(call, name, tensor.data_ptr())
        call.layers = native.ctypes.addressof(self._described())
        self.kernel.run(call, bfloat16)
        return y_BTD

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the decoder makes its own."""

    def _tables(self, row: Row, rows: int) -> Tensor:
        """Cosines and sines of each kind of rotation in turn, for the positions of the row."""
        position_N, longest = row.position_N[:rows], row.pages.context
        if longest not in self._frequencies:
            how = self.config.head_dim, longest, position_N.device
            self._frequencies = {longest: [frequencies(rope, *how) for rope in self.ropes]}
        return torch.stack([t for f in self._frequencies[longest] for t in tables_of(*f, position_N)])

    def _call(self, row: Row, rows: int, half: int) -> native.Call:
        config, data = self.config, row.pages.data
        return native.Call(
            page_stride=data.stride(0) * data.itemsize,
            half_stride=data.stride(2) * data.itemsize,
            count=len(self.blocks),
            rows=rows,
            width=config.width,
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            dim=config.head_dim,
            half=half,
            sequences=row.bounds_4S.shape[1],
            threads=torch.get_num_threads(),
            bf16=self.bf16,
            coded=row.pages.kv.kernel,
        )

    def _described(self) -> Any:
        if self._layers is None:
            self._layers = (native.Layer * len(self.blocks))(*map(self._layer, self.blocks))
        return self._layers

    def _layer(self, block: Any) -> native.Layer:
        how, attention = block.self_attn.how, block.self_attn
        maps = {name: self._matrix(plain(block.get_submodule(path))) for path, name in PATHS.items()}
        norms = {name: self._float(norm_weight(block, path)) for path, name in NORMS.items()}
        return native.Layer(
            **maps,
            **norms,
            eps=block.input_layernorm.eps,
            scale=how["scale"],
            cap=how["cap"] or 0.0,
            window=how["window"] or 0,
            table=self.ropes.index(attention.rope) if attention.rope else -1,
            act=native.ACTS.index(block.mlp.act),
        )

    def _matrix(self, m: Any) -> native.Matrix:
        return native.linear.matrix(m.tiles, self._kept_float(m.bias), m.kind, m.out_features, m.in_features)

    def _float(self, vector: Tensor | None) -> int | None:
        """Where a copy in float32 lies."""
        kept = self._kept_float(vector)
        return None if kept is None else kept.data_ptr()

    def _kept_float(self, vector: Tensor | None) -> Tensor | None:
        if vector is None:
            return None
        self._kept.append(vector.float().contiguous())
        return self._kept[-1]


def stack_of(decoder: "Decoder") -> Stack | None:
    """The decoder's blocks as one operator; None where they are not of the kind, or there is no compiler."""
    if not decoder.layers or not all(map(_fits, decoder.layers)):
        return None
    (ways, *others) = {(m.level, m.kind == "BF16") for b in decoder.layers for m in maps(b)}
    kernel = None if others else native.kernel(ways[0])
    return Stack(decoder, kernel) if kernel else None


def maps(block: nn.Module) -> Iterator[Any]:
    """The maps of a block, those below a bank."""
    return (plain(block.get_submodule(path)) for path in PATHS)


def plain(module: nn.Module) -> nn.Module:
    """The map below a bank."""
    return module.base if isinstance(module, Banked) else module


def norm_weight(block: Block, path: str) -> Tensor | None:
    """What a norm multiplies by; None where there is no such norm."""
    try:
        norm: Any = block.get_submodule(path)
    except AttributeError:
        return None
    return norm.weight.detach().float() + norm.plus_one


def _fits(block: nn.Module) -> bool:
    """Whether a block is one that the operator knows."""
    if not isinstance(block, Block) or block.roles != ROLES["before"] or block.parallel:
        return False
    attention, mlp = block.self_attn, block.mlp
    if not isinstance(mlp, FeedForward) or not mlp.gated or mlp.act not in native.ACTS or attention.clip is not None:
        return False
    if attention.q_norm is not None and not attention.norm_heads:
        return False
    norms = [block.input_layernorm, block.post_attention_layernorm, attention.q_norm, attention.k_norm]
    if not all(norm is None or isinstance(norm, RMSNorm) for norm in norms):
        return False
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
    return not hooked and all(map(_tiled, maps(block)))


def _tiled(m: nn.Module) -> bool:
    whole = isinstance(m, TiledLinear) and m.out_features % ROWS == 0 and m.in_features % 32 == 0
    return whole and m.tiles.device.type == "cpu"


def _links(block: nn.Module) -> Iterator[tuple[dict, str, object]]:
    """All that the operator relies on, as (where it hangs, its name, what hung there)."""
    for module in block.modules():
        for holder in (module._modules, module._buffers, module._parameters):
            yield from ((holder, name, thing) for name, thing in holder.items() if thing is not None)
