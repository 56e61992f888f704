"""A decoder below its head as one operator, where nothing stands between.

Most of a step of few tokens is reading the weights; what lies between, some hundred small operators, would take longer.
native/stack.cpp does all of it in one call, from tokens to the state that the head reads: the same as `Decoder.hidden`,
in float32 between its products. It takes blocks of the Llama kind, norms before both halves, a gated feed-forward, all
maps in tiles, over pages of keys and values. A map that was swapped for another, a hook, an adapter on one of the rows:
then the blocks run one by one.
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
from satchel.model.rope import Rope, frequencies
from satchel.model.tiles import ROWS, TiledEmbedding, TiledLinear
from satchel.native import stack as native

if TYPE_CHECKING:
    from satchel.model.decoder import Decoder

# N rows of a step, D width, K kinds of rotation, R half of the rotated dimensions

PATHS = {f"self_attn.{name}_proj": name for name in "qkvo"} | {
    f"mlp.{name}_proj": name for name in ("gate", "up", "down")
}
NORMS = {"input_layernorm": "into_attention", "post_attention_layernorm": "into_mlp"}
NORMS |= {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}


class Stack:
    """What lies below the head of one decoder."""

    def __init__(self, decoder: "Decoder", kernel: native.Kernel) -> None:
        trunk = decoder.model
        self.config, self.kernel, self.dtype = decoder.config, kernel, decoder.dtype
        self.blocks: list[Any] = list(decoder.layers)
        self.embeddings = trunk.embed_tokens if isinstance(trunk.embed_tokens, TiledEmbedding) else None
        self.norm: Any = trunk.norm
        self.bf16 = next(maps(self.blocks[0])).kind == "BF16"  # of all
        self.ropes: list[Rope] = list({b.self_attn.rope: None for b in self.blocks if b.self_attn.rope})
        self._children = [module._modules for module in trunk.modules() if module._modules]
        self._modules = [list(children.values()) for children in self._children]  # when this was put together
        self._banked = next((m for m in trunk.modules() if isinstance(m, Banked)), None)
        self._kept: list[Any] = []  # what the kernel reads
        self._frequencies: dict[int, tuple[Tensor, Tensor]] = {}  # by the longest sequence that there may be
        self._described: dict[str, Any] = {}  # what stays the same from call to call

    def untouched(self) -> bool:
        """Whether all modules are still in their places. Equal is identical: no module has another notion of it."""
        return all(map(operator.eq, map(list, map(dict.values, self._children)), self._modules))

    def idle(self) -> bool:
        """Whether no row has an adapter now."""
        return self._banked is None or self._banked.idle

    def __call__(self, start: Tensor, row: Row) -> Tensor:
        """The state [1, N, D] before the head. `start`: the tokens [1, N], or [1, N, D] where embeddings are not in
        tiles. Rows of filler become zeros."""
        rows, bfloat16 = start.shape[1] - row.filler, self.dtype == torch.bfloat16
        y_BTD = torch.zeros(*start.shape[:2], self.config.width, dtype=self.dtype)
        frequency_KR, factor_K = self._turns(row.pages.context)
        call = self._call(row, rows, frequency_KR)
        room = torch.empty(self.kernel.room_bytes(call, bfloat16), dtype=torch.uint8)
        if isinstance(start, FakeTensor):
            return y_BTD
        tensors = {"tokens" if self.embeddings else "x": start.contiguous(), "y": y_BTD, "pool": row.pages.data}
        tensors |= {"frequencies": frequency_KR, "factors": factor_K, "room": room}
        tensors |= {"pages": row.pages_M, **row.bounds, **row.sight}
        for name, tensor in tensors.items():
            setattr(call, name, tensor.data_ptr())
        for name, value in self._lasting().items():
            setattr(call, name, value)
        self.kernel.run(call, bfloat16)
        return y_BTD

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the decoder makes its own."""

    def _turns(self, longest: int) -> tuple[Tensor, Tensor]:
        """Frequencies [K, R] of each kind of rotation and factors [K] on its cosines and sines."""
        if longest not in self._frequencies:
            found = [frequencies(rope, self.config.head_dim, longest, torch.device("cpu")) for rope in self.ropes]
            some_KR = torch.stack([f for f, _ in found]) if found else torch.empty(0, 0)
            self._frequencies = {longest: (some_KR.contiguous(), torch.tensor([factor for _, factor in found]))}
        return self._frequencies[longest]

    def _call(self, row: Row, rows: int, frequency_KR: Tensor) -> native.Call:
        config, data = self.config, row.pages.data
        kinds, half = frequency_KR.shape
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
            kinds=kinds,
            sequences=row.bounds_4S.shape[1],
            threads=torch.get_num_threads(),
            embed_scale=config.embed_scale,
            eps=self.norm.eps if self.norm else 0.0,
            bf16=self.bf16,
            coded=row.pages.kv.kernel,
        )

    def _lasting(self) -> dict[str, Any]:
        """What a call says of the weights."""
        if not self._described:
            layers = (native.Layer * len(self.blocks))(*map(self._layer, self.blocks))
            embeddings = self._matrix(self.embeddings.base) if self.embeddings else None
            self._described = {"layers": native.ctypes.addressof(layers), "norm": self._float(weight_of(self.norm))}
            self._described["embeddings"] = native.ctypes.addressof(embeddings) if embeddings else None
            self._kept += [layers, embeddings]
        return self._described

    def _layer(self, block: Any) -> native.Layer:
        how, attention = block.self_attn.how, block.self_attn
        maps = {name: self._matrix(plain(block.get_submodule(path))) for path, name in PATHS.items()}
        norms = {name: self._float(weight_of(norm_of(block, path))) for path, name in NORMS.items()}
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
        self._kept.append(m.tiles)
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
    """What lies below the decoder's head as one operator; None where it is not of the kind, or there is no compiler."""
    if not decoder.layers or not _plain_ends(decoder.model) or not all(map(_fits, decoder.layers)):
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


def norm_of(block: Block, path: str) -> Any:
    """A norm of a block; None where there is no such norm."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def weight_of(norm: Any) -> Tensor | None:
    """What a norm multiplies by; None where there is no norm."""
    return None if norm is None else norm.weight.detach().float() + norm.plus_one


def _plain_ends(trunk: Any) -> bool:
    """Whether there is nothing but embeddings before the blocks, and nothing but an RMS norm behind."""
    others = trunk.embed_positions, trunk.project_in, trunk.project_out
    plain = all(other is None for other in others) and isinstance(trunk.norm, RMSNorm | None)
    return plain and not _hooked(trunk.embed_tokens) and (trunk.norm is None or not _hooked(trunk.norm))


def _hooked(module: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


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
    return not _hooked(block) and all(map(_tiled, maps(block)))


def _tiled(m: nn.Module) -> bool:
    whole = isinstance(m, TiledLinear) and m.out_features % ROWS == 0 and m.in_features % 32 == 0
    return whole and m.tiles.device.type == "cpu"
