"""Keys and values of many sequences in pages of one pool, and a row of their new tokens to run at once.

    pool = Pool(config, blocks=1000, dtype=torch.bfloat16)
    row = Row(pool.pages, [Stretch(table, past=32, tokens=1), ...]);   x_1ND = decoder.hidden(tokens_1N, cache=row)

A block is 16 tokens in all layers, contiguous, so that it is moved by one copy. Within it lie, layer by layer, the keys
as [K, E, 16] and the values as [K, 16, E], or what the slot `kv` makes of them (kv.py); behind them those of a second
model that reads the same tokens, if there is one: who holds, shares, copies or moves a block does so for both. The new
tokens of all sequences form one row without padding; each attends to its own sequence only, through the sequence's
table of blocks. Its last ones may be a tree of guesses: a guess lies in the slot after the guess before it, stands at
the position after its parent's, and sees what came before the tree and its own branch. On a CPU that is
native/paged.cpp, which copies nothing; elsewhere, and without a compiler, it is torch (spans.py), which knows of pages
only what `store` and `read` do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from satchel.model.config import ModelConfig
from satchel.model.kv import kv_of, parts_of, token_bytes
from satchel.model.spans import SpanLayer, Spans, cut, fitting, laid, weighed
from satchel.native import paged as native

# N tokens of the row, T of one sequence, S sequences or its slots, B blocks of X numbers, M pages of all tables,
# H query heads, K kv heads, E head dim, P = PAGE

PAGE = native.PAGE
TREE = 63  # tokens of a tree at most: bits of a number


class Pages:
    """The keys and values of one model in a pool."""

    def __init__(self, data_BX: Tensor, config: ModelConfig, context: int, kv: str = "none") -> None:
        """`data_BX`: its part of every block; `kv`: how keys and values lie there."""
        self.data = data_BX.unflatten(1, (config.layers, 2, config.kv_heads, -1))
        self.context = context  # the longest sequence there will be, tokens
        self.heads, self.dim, self.kv = config.kv_heads, config.head_dim, kv_of(kv)
        self.weighed: Callable[..., Tensor] = weighed  # what a softmax over them is made by
        keys, values = (parts_of(self.kv, half, self.dim) for half in self.data.unbind(2))
        self.keys = [part.unflatten(-1, (-1, PAGE)) for part in keys]  # [B, layers, K, n, P] each
        self.values = [part.unflatten(-1, (PAGE, -1)) for part in values]  # [B, layers, K, P, n]

    @property
    def native(self) -> bool:
        """Whether the compiled kernel knows these pages and numbers."""
        data = self.data
        known = data.device.type == "cpu" and data.dtype in (torch.float32, torch.bfloat16)
        return known and self.kv.kernel is not None and native.library() is not None

    def store(self, layer: int, slot_N: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> None:
        """Keys and values of a layer go into slots of the pool, counted over all its blocks."""
        for key, new in zip(self.keys, self.kv.encode(k_NKE), strict=True):
            key[:, layer][slot_N // PAGE, :, :, slot_N % PAGE] = new
        for value, new in zip(self.values, self.kv.encode(v_NKE), strict=True):
            value[:, layer][slot_N // PAGE, :, slot_N % PAGE] = new

    def read(self, layer: int, page_AL: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of the keys [A, K, E, L * P] and values [A, K, L * P, E] in pages of a layer, as numbers."""
        head_K1 = torch.arange(self.heads, device=page_AL.device)[:, None]
        keys = [_chosen(key[:, layer], page_AL, head_K1).transpose(2, 3) for key in self.keys]
        values = [value[:, layer][page_AL[:, None], head_K1].flatten(2, 3) for value in self.values]
        dtype = self.data.dtype
        return self.kv.decode(keys, dtype).transpose(2, 3), self.kv.decode(values, dtype)

    def move(self, old_M: Tensor, new_M: Tensor) -> None:
        """Copy tokens between slots of the pool, counted over all its blocks."""
        for key in self.keys:
            key[new_M // PAGE, :, :, :, new_M % PAGE] = key[old_M // PAGE, :, :, :, old_M % PAGE]
        for value in self.values:
            value[new_M // PAGE, :, :, new_M % PAGE] = value[old_M // PAGE, :, :, old_M % PAGE]


def _chosen(key_BKnP: Tensor, page_AL: Tensor, head_K1: Tensor) -> Tensor:
    """A part of the keys in some pages, [A, K, n, L * P]."""
    number_n1 = torch.arange(key_BKnP.shape[2], device=page_AL.device)[:, None]
    return key_BKnP[page_AL[:, None, None], head_K1[..., None], number_n1].flatten(3)


class Pool:
    """Blocks for the keys and values of PAGE tokens each. The memory is not initialised."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        context: int = 0,
        beside: ModelConfig | None = None,
        kv: str = "none",
    ) -> None:
        """`context`: the longest sequence there will be, tokens; 0: the longest that the model was made for.

        `beside`: a second model, whose keys and values of the same tokens lie in the same blocks.
        `kv`: how they all lie there, as the slot of this name spells it.
        """
        configs = [config, *([beside] if beside else [])]
        sizes = [block_bytes(each, dtype, kv) // dtype.itemsize for each in configs]
        self.data = torch.empty(blocks, sum(sizes), dtype=dtype, device=device)
        parts = zip(self.data.split(sizes, dim=1), configs, strict=True)
        self.pages, *more = (Pages(part_BX, each, context or config.context, kv) for part_BX, each in parts)
        self.beside = more[0] if more else None

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.data.shape[0]

    @property
    def block_bytes(self) -> int:
        """Of one block."""
        return self.data[0].nbytes

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each (from, to)."""
        for source, target in pairs:
            self.data[target].copy_(self.data[source])

    def gather(self, table: Sequence[int], first: int, kept: Sequence[int]) -> None:
        """The tokens in the slots `first + kept[i]` of a sequence move to `first + i`; `kept` rises."""
        pairs = [(first + old, first + new) for new, old in enumerate(kept) if old != new]
        if not pairs:
            return
        slots = [[table[slot // PAGE] * PAGE + slot % PAGE for slot in pair] for pair in pairs]
        old_M, new_M = torch.tensor(slots, device=self.data.device).T
        for pages in (self.pages, self.beside):
            if pages is not None:
                pages.move(old_M, new_M)


def block_bytes(config: ModelConfig, dtype: torch.dtype, kv: str = "none") -> int:
    """Bytes of the keys and values of PAGE tokens of one model."""
    return 2 * config.layers * config.kv_heads * PAGE * token_bytes(kv_of(kv), config.head_dim, dtype)


@dataclass(frozen=True)
class Stretch:
    """New tokens of one sequence."""

    table: Sequence[int]  # its blocks; they hold `past` tokens and have room for `tokens` more
    past: int
    tokens: int
    parents: Sequence[int] = ()  # of a tree, which its last tokens are: each the number of an earlier one, -1: none


def sights(stretches: Sequence[Stretch]) -> list[list[int]]:
    """Of each token, [3, N]: the slot below which it sees all, those from there on as bits, its position."""
    slots = [slot for stretch in stretches for slot in range(stretch.past, stretch.past + stretch.tokens)]
    limits, seen, positions = [slot + 1 for slot in slots], [0] * len(slots), list(slots)
    end = 0
    for stretch in stretches:
        end += stretch.tokens
        if stretch.parents:
            begin = stretch.past + stretch.tokens - len(stretch.parents)
            branches = ancestry(stretch.parents)[-stretch.tokens :]
            tree = slice(end - len(branches), end)
            limits[tree], seen[tree] = [begin] * len(branches), branches
            positions[tree] = [begin + branch.bit_count() - 1 for branch in branches]
    return [limits, seen, positions]


def ancestry(parents: Sequence[int]) -> list[int]:
    """For each token of a tree, itself and those that it stands on, as bits."""
    assert len(parents) <= TREE
    branches: list[int] = []
    for number, parent in enumerate(parents):
        branches.append(1 << number | (branches[parent] if parent >= 0 else 0))
    return branches


class Row:
    """The sequences of one forward pass: where their new tokens stand and where their pasts lie."""

    def __init__(self, pages: Pages, stretches: Sequence[Stretch], tokens: int = 0) -> None:
        """`tokens`: of the row; beyond those of the stretches it is filler, whose result means nothing."""
        self.pages, self.stretches = pages, stretches
        device, ends = pages.data.device, list(accumulate(stretch.tokens for stretch in stretches))
        used = [stretch.table[: -(-(stretch.past + stretch.tokens) // PAGE)] for stretch in stretches]
        self.filler = max(tokens - ends[-1], 0)
        self.pages_M = torch.tensor([page for table in used for page in table], dtype=torch.int32)
        starts, pasts = [0, *accumulate(map(len, used))], [stretch.past for stretch in stretches]
        rows_4S1 = torch.tensor([starts, [0, *ends], [*pasts, 0], [*ends, 0]], dtype=torch.int32)
        self.bounds_4S, self.first_S1 = rows_4S1[:, :-1], rows_4S1[1]  # see `_paged_attention`; and behind the last
        self.sight_3N = torch.tensor(sights(stretches), dtype=torch.int64, device=device)
        self.position_N = self.sight_3N[2]
        if self.filler:
            self.position_N = torch.cat([self.position_N, self.position_N.new_zeros(self.filler)])
        self._layers: Sequence[LayerPages | SpanLayer] = []

    @property
    def layers(self) -> Sequence["LayerPages | SpanLayer"]:
        """The row as each layer sees it; made when first asked for: all blocks as one operator never do."""
        if not self._layers:
            count = range(self.pages.data.shape[1])
            self._layers = [LayerPages(self, index) for index in count] if self.pages.native else self.spans.layers
        return self._layers

    @property
    def bounds(self) -> dict[str, Tensor]:
        """Where the sequences lie, as the kernels call it."""
        return {"table": self.bounds_4S[0], "first": self.first_S1, "past": self.bounds_4S[2]}

    @property
    def spans(self) -> Spans:
        """The row as torch attends."""
        tiles = cut(self.stretches)
        shape = fitting(tiles, len(self.position_N))
        flat = torch.tensor(laid(shape, tiles, self.stretches, sights(self.stretches)))
        return Spans(self.pages, shape, flat.to(self.pages.data.device))

    @property
    def sight(self) -> dict[str, Tensor]:
        """What each token may see, as the kernels call it."""
        return dict(zip(native.SIGHT, self.sight_3N, strict=True))

    def suits(self, dtype: torch.dtype) -> bool:
        """Whether compiled kernels know these pages and numbers of this type."""
        data = self.pages.data
        known = self.pages.kv.kernel is not None
        return known and data.device.type == "cpu" and dtype == data.dtype in (torch.float32, torch.bfloat16)

    def positions(self, tokens_BT: Tensor) -> tuple[Tensor, int]:
        """The tokens' positions, and the longest sequence that there may be: one for all, so that no frequency depends
        on the company."""
        return self.position_N, self.pages.context


class LayerPages:
    """One layer of a row."""

    def __init__(self, row: Row, index: int) -> None:
        self.row, self.index = row, index

    def attend(
        self,
        q_1NHE: Tensor,
        k_1NKE: Tensor,
        v_1NKE: Tensor,
        *,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
    ) -> Tensor:
        """Stores keys and values of the new tokens, and attends from these: [1, N, H, E]."""
        row, data = self.row, self.row.pages.data
        keys, values = data[:, self.index, 0], data[:, self.index, 1]
        how = scale, window or 0, cap or 0.0, row.pages.kv.kernel
        return torch.ops.satchel.paged_attention(
            q_1NHE[0], k_1NKE[0], v_1NKE[0], keys, values, row.pages_M, row.bounds_4S, row.sight_3N, *how
        )[None]


torch.library.define(
    "satchel::paged_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor pages, Tensor bounds, Tensor sight, "
    "float scale, int window, float cap, int coded=0) -> Tensor",
)


@torch.library.impl("satchel::paged_attention", "CPU")
def _paged_attention(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    keys: Tensor,
    values: Tensor,
    pages_M: Tensor,
    bounds_4S: Tensor,
    sight_3N: Tensor,
    scale: float,
    window: int,
    cap: float,
    coded: int = 0,
) -> Tensor:
    """Out [N, H, E]; zero where a row is filler. Keys and values of one layer are [blocks, K, X].

    `bounds` holds for each sequence where its table begins in `pages`, its first new token's row, the tokens before it,
    and the row after its last new token; `sight` is what `sights` says.
    """
    kernel = native.library()
    assert kernel is not None
    q_NHE, k_NKE, v_NKE = (t if t.flatten(1).stride(1) == 1 else t.contiguous() for t in (q_NHE, k_NKE, v_NKE))
    if v_NKE.stride(0) != k_NKE.stride(0):
        k_NKE, v_NKE = k_NKE.contiguous(), v_NKE.contiguous()
    out_NHE = torch.zeros_like(q_NHE, memory_format=torch.contiguous_format)
    table_S, first_S, past_S, stop_S = bounds_4S
    first_S = torch.cat([first_S, stop_S[-1:]])
    tensors = {"q": q_NHE, "k": k_NKE, "v": v_NKE, "keys": keys, "values": values, "out": out_NHE}
    tensors |= {"pages": pages_M, "table": table_S, "first": first_S, "past": past_S} | dict(
        zip(native.SIGHT, sight_3N, strict=True)
    )
    native.attend(
        kernel,
        native.Batch(
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            page_stride=keys.stride(0) * keys.itemsize,
            q_row=q_NHE.stride(0),
            k_row=k_NKE.stride(0),
            sequences=len(table_S),
            heads=q_NHE.shape[1],
            kv_heads=k_NKE.shape[1],
            dim=q_NHE.shape[2],
            window=window,
            coded=coded,
            scale=scale,
            cap=cap,
        ),
        keys.dtype,
    )
    return out_NHE


@torch.library.register_fake("satchel::paged_attention")
def _paged_attention_fake(q_NHE: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty_like(q_NHE, memory_format=torch.contiguous_format)
