"""Moves what a block keeps for its backward pass to the second tier, and computes again what was not moved.

autograd's hooks for saved tensors hand over every tensor that a block keeps. When the next block begins, these are
moved out: a block's input and what its attention found whole, of all others the first tokens. When the backward pass
first asks for one, they come back, and the block runs again on the other tokens, from its input: everything but
attention acts on each token by itself, and what attention found for them is known. The rows that this second run would
keep are the rows that are missing. So any block, adapter or format works that keeps one row a token; what has other
shapes is moved whole, and where tokens are routed to experts, all tokens are run again or none.

The last block's tensors are never moved: its backward pass comes first.
Shapes: B batch, T tokens, N = B T, D width, H heads, E head dim, M tokens that are moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from satchel.model.attention import Place
from satchel.train._tier import Region, Tier, tier_of

Source = int | str  # the number of a saved tensor in its block, or q, k, v


@dataclass(eq=False)
class Piece:
    """One storage that a block keeps, as a flat tensor; None while it is elsewhere."""

    flat: Tensor | None
    numel: int
    dtype: torch.dtype
    source: Source | None = None  # what a second run makes it from; None: nothing does
    by_token: bool = False  # whether its first dimension is the tokens

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """The whole storage behind a tensor."""
        flat = _flat(tensor)
        return cls(flat, flat.numel(), flat.dtype)

    @property
    def nbytes(self) -> int:
        """Of the storage."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """As a tensor lies."""
        return cls(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def on(self, flat: Tensor) -> Tensor:
        """The same on another storage."""
        flat = flat if flat.dtype == self.dtype else flat.view(self.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, eq=False)
class Slot:
    """What the graph holds in place of a saved tensor. Pieces live as long as their slots."""

    piece: Piece
    layer: Layer
    view: View

    def tensor(self) -> Tensor:
        """The tensor, from wherever it is."""
        if self.piece.flat is None:
            self.layer.load()
        assert self.piece.flat is not None
        return self.view.on(self.piece.flat)


@dataclass(frozen=True)
class Sizes:
    """What the choice of how many tokens to move depends on."""

    whole_bytes: int  # moved whatever is chosen
    rest_bytes: int  # of all tokens
    tokens: int
    block: nn.Module
    lengths: tuple[int, ...]  # of the documents
    beside: bool  # whether moving runs beside computing


@dataclass(frozen=True)
class Part:
    """What of a piece went to the second tier."""

    piece: weakref.ref[Piece]
    moved: int  # numbers, from its beginning
    numel: int
    dtype: torch.dtype


class Store:
    """What the blocks of one model share."""

    def __init__(self, choose: Callable[[Sizes], int], home: Path | None) -> None:
        self.choose, self.home = choose, home  # tokens to move; the folder of a file
        self.tier: Tier | None = None
        self.newest: Callable[[], Layer | None] = lambda: None  # the block that ran last, as long as its graph lives

    def run(self, block: nn.Module, index: int, x_BTD: Tensor, place: Place) -> Tensor:
        """Block `index` on x_BTD; what it keeps is moved when the next one begins."""
        if index == 0:
            self.newest = lambda: None
        self.tier = self.tier or tier_of(x_BTD.device, self.home)
        before = self.newest()
        if before is not None:
            before.leave(self.tier, self.choose(before.sizes()))
        layer = Layer(block, x_BTD, place, self.newest)
        y_BTD = layer.run(x_BTD)
        self.newest = weakref.ref(layer)
        return y_BTD


class Layer:
    """One run of a block."""

    def __init__(self, block: nn.Module, x_BTD: Tensor, place: Place, before: Callable[[], Layer | None]) -> None:
        self.block, self.place, self.before = block, place, before
        self.x_view, self.x_needs_grad, self.device = View.of(x_BTD), x_BTD.requires_grad, x_BTD.device
        self.tokens = x_BTD.shape[0] * x_BTD.shape[1]
        self.constants = constants(block, place)
        self.input = Piece.of(x_BTD)
        self.found: tuple[Piece, View] | None = None  # what attention found
        self.open = {storage_key(x_BTD): self.input}  # pieces by storage, while the block runs
        self.projected: dict[int, Source] | None = None  # q, k and v by storage, while attention runs
        self.count = 0  # tensors saved outside of attention
        self.pieces: list[weakref.ref[Piece]] = []
        self.moved = 0  # tokens in the second tier
        self.parts: list[Part] = []  # what went there,
        self.tier: Tier | None = None
        self.region: Region | None = None  # and where it lies

    def run(self, x_BTD: Tensor) -> Tensor:
        """The block, with hooks for what it saves. From then on the graph alone keeps its pieces."""
        place = Recorded(self.place.tables, self.place.lengths, self.place.cache, layer=self)
        with saved_tensors_hooks(self.pack, _unpack):
            y_BTD = self.block(x_BTD, place)
        self.pieces = [weakref.ref(piece) for piece in self.open.values()]
        self.open = {}
        return y_BTD

    def pack(self, tensor: Tensor) -> Tensor | Slot:
        """What the graph is to hold of a tensor."""
        key = storage_key(tensor)
        if key in self.constants:
            return tensor.detach()
        piece = self.open[key] if key in self.open else self.open.setdefault(key, Piece.of(tensor))
        source = self.projected.get(key) if self.projected is not None else self.count
        self.count += self.projected is None
        if piece.source is None and covers(tensor, piece.nbytes):
            piece.source, piece.by_token = source, self._by_token(tensor)
        return Slot(piece, self, View.of(tensor))

    def sizes(self) -> Sizes:
        """What moving its tokens would move."""
        pieces = list(self._alive())
        rest = sum(piece.nbytes for piece in pieces if self._is_rest(piece))
        lengths = self.place.lengths or (self.x_view.size[1],) * self.x_view.size[0]
        return Sizes(
            sum(piece.nbytes for piece in pieces) - rest,
            rest,
            self.tokens,
            self.block,
            lengths,
            self.device.type == "cuda",
        )

    def leave(self, tier: Tier, tokens: int) -> None:
        """Move the pieces to the second tier; of those that a second run can make, the rows of `tokens` tokens."""
        self.tier, self.moved = tier, tokens
        pieces = list(self._alive())
        self.parts = [Part(weakref.ref(piece), self._moved(piece), piece.numel, piece.dtype) for piece in pieces]
        flats = [(piece.flat, part.moved) for piece, part in zip(pieces, self.parts, strict=True)]
        self.region = tier.spill([flat[:moved] for flat, moved in flats if flat is not None and moved])
        for piece in pieces:
            piece.flat = None

    def load(self) -> None:
        """Bring back what was moved, and compute the rest again."""
        assert self.tier is not None and self.region is not None
        moved = [part for part in self.parts if part.moved]
        flats = [torch.empty(part.numel, dtype=part.dtype, device=self.device) for part in moved]
        self.tier.fetch(self.region, [flat[: part.moved] for flat, part in zip(flats, moved, strict=True)])
        for flat, part in zip(flats, moved, strict=True):
            if piece := part.piece():
                piece.flat = flat
        before = self.before()
        if before is not None and before.region is not None:
            self.tier.prefetch(before.region)
        if self.moved < self.tokens:
            Again(self).run()

    def lacking(self) -> dict[Source, Piece]:
        """The pieces that lack rows, by what makes them."""
        return {p.source: p for p in self._alive() if p.source is not None and self._moved(p) < p.numel}

    def _alive(self) -> Iterator[Piece]:
        return filter(None, (ref() for ref in self.pieces))

    def _is_rest(self, piece: Piece) -> bool:
        """Whether a second run can make it."""
        whole = piece is self.input or (self.found is not None and piece is self.found[0])
        return not whole and piece.source is not None

    def _moved(self, piece: Piece) -> int:
        """How many of a piece's numbers are moved."""
        if not self._is_rest(piece) or (self.moved and not piece.by_token):
            return piece.numel
        return piece.numel // self.tokens * self.moved

    def _by_token(self, tensor: Tensor) -> bool:
        return tensor.shape[:2] == self.x_view.size[:2] or (tensor.dim() > 0 and len(tensor) == self.tokens)


@dataclass(frozen=True, eq=False)
class Recorded(Place):
    """A place that tells a layer about its attention."""

    layer: Layer | None = None

    def attend(self, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, **how: Any) -> Tensor:
        """What attention finds, which is never computed again."""
        assert self.layer is not None
        projected = zip("qkv", (q_BTHE, k_BSKE, v_BSKE), strict=True)
        self.layer.projected = {storage_key(tensor): name for name, tensor in projected}
        out_BTHE = super().attend(q_BTHE, k_BSKE, v_BSKE, **how)
        self.layer.projected = None
        piece = self.layer.open.setdefault(storage_key(out_BTHE), Piece.of(out_BTHE))
        self.layer.found = piece, View.of(out_BTHE)
        return out_BTHE


class Enough(Exception):
    """A second run has made all that is lacking."""


class Again:
    """A block's second run, on the tokens that were not moved. It fills the pieces of its layer."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.lacking, self.count = layer, layer.lacking(), 0
        tables = layer.place.tables
        if layer.moved:  # the other tokens are one row
            rows, moved = layer.x_view.size[0], layer.moved
            tables = {r: (_rest(cos, rows, moved), _rest(sin, rows, moved)) for r, (cos, sin) in tables.items()}
        self.tables = tables
        self.constants = constants(layer.block, Place(tables))

    def run(self) -> None:
        """Run the block until nothing is lacking."""
        x_BTD = self._tokens(self.layer.input, self.layer.x_view).detach().requires_grad_(self.layer.x_needs_grad)
        place = Given(self.tables, again=self)
        with torch.enable_grad(), saved_tensors_hooks(self.pack, _unpack), suppress(Enough):
            self.layer.block(x_BTD, place)
        assert not self.lacking, f"a block's second run differs from its first: it lacks {list(self.lacking)}"

    def pack(self, tensor: Tensor) -> None:
        """Take what is lacking; this graph is for nothing else."""
        if storage_key(tensor) not in self.constants:
            self.count += 1
            self.fill(self.count - 1, tensor)

    def fill(self, source: Source, tensor: Tensor) -> None:
        """Complete the piece that comes from this source, if one does."""
        piece = self.lacking.pop(source, None)
        if piece is None:
            return
        if piece.flat is None:
            piece.flat = _flat(tensor) if covers(tensor, piece.nbytes) else tensor.detach().reshape(-1)
        else:
            moved = piece.numel // self.layer.tokens * self.layer.moved
            piece.flat[moved:].copy_(tensor.detach().reshape(-1))
        if not self.lacking:
            raise Enough

    def found(self, needs_grad: bool) -> Tensor:
        """What attention found for these tokens."""
        assert self.layer.found is not None
        return self._tokens(*self.layer.found).detach().requires_grad_(needs_grad)

    def _tokens(self, piece: Piece, view: View) -> Tensor:
        assert piece.flat is not None
        tensor = view.on(piece.flat)
        return tensor.flatten(0, 1)[self.layer.moved :][None] if self.layer.moved else tensor


@dataclass(frozen=True, eq=False)
class Given(Place):
    """A place where attention is known."""

    again: Again | None = None

    def attend(self, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, **how: Any) -> Tensor:
        """What it found the first time."""
        assert self.again is not None
        projected = (q_BTHE, k_BSKE, v_BSKE)
        for name, tensor in zip("qkv", projected, strict=True):
            self.again.fill(name, tensor)
        return self.again.found(any(tensor.requires_grad for tensor in projected))


def constants(block: nn.Module, place: Place) -> set[int]:
    """The storages that outlive the block's backward pass anyhow: parameters, buffers, tables of positions."""
    tables = (table for pair in place.tables.values() for table in pair)
    return {storage_key(tensor) for tensor in (*block.parameters(), *block.buffers(), *tables)}


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that share a storage, as long as one of them lives."""
    return id(tensor.untyped_storage())


def covers(tensor: Tensor, nbytes: int) -> bool:
    """Whether a tensor is all of a storage, in order."""
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == nbytes


def _flat(tensor: Tensor) -> Tensor:
    """All of the storage behind a tensor."""
    numel = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((numel,), (1,), 0)


def _rest(table_TR: Tensor, rows: int, moved: int) -> Tensor:
    """The positions of the tokens that were not moved, of rows that share a table."""
    return table_TR.repeat(rows, 1)[moved:]


def _unpack(packed: Tensor | Slot) -> Tensor:
    return packed.tensor() if isinstance(packed, Slot) else packed
