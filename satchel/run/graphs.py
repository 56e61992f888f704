"""Steps of few tokens a sequence, recorded once and run again: on a GPU one launch instead of some thousand.

    runner = Recorded(model, pages);   runner.warm(batch=32, guesses=0);   x_ND = runner.hidden(parts)

A step between two of whose operators nothing comes to the host is the same operators each time, on other numbers. So it
is recorded for each size that steps have (sequences, and pages of the longest), from numbers that lie in one tensor; a
later step of at most that size writes its own there and is run again. What has no recording runs as it always did:
prompts, adapters on a row, feed-forwards that may be left out, modules that were swapped or hooked, more sequences than
were recorded, experts and rotary positions of the kind longrope, which copy to or from the host. Recordings share their
memory: what a step gave is gone when the next one has run. A recorded step reads tables as long as its size is, for
all its sequences: more than it must by a factor of two, or more where one is much longer than the others.

No GPU has run CudaGraphs yet; tests/run/test_gpu.py is what the first one should be given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from satchel.core.serve_seams import Draft, Skipper
from satchel.model.bank import Banked
from satchel.model.decoder import Decoder
from satchel.model.forward import Part, hidden, padded
from satchel.model.paged import PAGE, Pages, Stretch, sights
from satchel.model.spans import FEW, Group, Shape, Spans, Tile, cut, laid
from satchel.run.compiled import Compiled

# N tokens of a row, D width

GRAPH_BYTES = 4 << 20  # of one recording beside its tensors: a guess, which no GPU has confirmed
STREAM_BYTES = 32 << 20  # that matrix products set aside for the stream on which steps are recorded
LENGTHS = (13, 21, 1)  # tokens of steps in which operators are compiled: sizes that meet none of a model's, and one
PAST = 96  # tokens before these
SHORTEST = 16  # pages of the shortest table that steps are recorded for; each next is twice as long


class Eager:
    """Runs the operators of every step one by one, compiled or as they are."""

    replayed = 0  # steps that were a recording's

    def __init__(self, model: Decoder, pages: Pages, compiled: Compiled | None = None) -> None:
        self.model, self.pages, self.compiled = model, pages, compiled

    def hidden(self, parts: Sequence[Part], skipper: Skipper | None = None) -> Tensor:
        """The state [N, D] before the head of every token of the step; good until the next one."""
        return hidden(self.model, self.pages, parts, skipper)

    def warm(self, batch: int, guesses: int) -> None:
        """Prepare for steps of up to `batch` sequences, each with up to so many guesses."""
        if self.compiled:
            with self.compiled.into(self.model, self.pages), _kept(self.pages):
                for tokens in LENGTHS:
                    stop = min(tokens + PAST, self.pages.context)
                    past, table = max(stop - tokens, 0), [0] * -(-stop // PAGE)
                    hidden(self.model, self.pages, [Part([0] * (stop - past), Draft(), table, past, 0)])


class Recorder(Protocol):
    """What records operators."""

    def __call__(self, run: Callable[[], Tensor], /) -> tuple[Callable[[], object], Tensor]:
        """Something that does again what `run` does, and the tensor in which it leaves the result. Raises RuntimeError
        for what cannot be recorded."""
        ...

    @property
    def full(self) -> bool:
        """Whether there is no memory for more."""
        ...


class CudaGraphs:
    """Records on the current CUDA device, within `room_bytes` of its memory."""

    def __init__(self, room_bytes: int) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.least_free = torch.cuda.mem_get_info()[0] - room_bytes

    def __call__(self, run: Callable[[], Tensor], /) -> tuple[Callable[[], object], Tensor]:
        """As `Recorder` says. What comes to the host is found before recording starts, where it does no harm."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            run()  # what libraries set up at their first call
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.stream(torch.cuda.current_stream())
        with here, torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            out = run()  # if that fails, `here` is gone back to
        return graph.replay, out

    @property
    def full(self) -> bool:
        """Whether as much memory is taken as there was room for."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] < self.least_free


class Recording:
    """Steps of one shape."""

    def __init__(self, model: Decoder, pages: Pages, shape: Shape, record: Recorder) -> None:
        self.model, self.pages, self.shape = model, pages, shape
        size, device = shape.rows + sum(shape.sizes), pages.data.device
        self.flat = torch.zeros(size, dtype=torch.int64, device=device)
        self.host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.replay, self.x_ND = record(self._run)

    def hidden(self, parts: Sequence[Part], stretches: Sequence[Stretch], tiles: Sequence[Tile]) -> Tensor:
        """As `Eager.hidden`; rows beyond the parts' mean nothing."""
        numbers = self.host.numpy()
        tokens = [token for part in parts for token in (*part.tokens, *part.draft.tokens)]
        numbers[: self.shape.rows] = 0
        numbers[: len(tokens)] = tokens
        numbers[self.shape.rows :] = laid(self.shape, [tiles], stretches, sights(stretches))
        self.flat.copy_(self.host)
        self.replay()
        return self.x_ND

    def _run(self) -> Tensor:
        tokens_N, numbers = self.flat.split([self.shape.rows, sum(self.shape.sizes)])
        return self.model.hidden(tokens_N[None], cache=Spans(self.pages, self.shape, numbers))[0]


class Recorded(Eager):
    """Runs what it has recorded; else as `Eager`."""

    def __init__(self, model: Decoder, pages: Pages, record: Recorder, compiled: Compiled | None = None) -> None:
        super().__init__(model, pages, compiled)
        self.record = record
        self.recordings: dict[Shape, Recording] = {}
        self._sizes: tuple[list[int], ...] = ()
        self._links: list[tuple[dict, str, object]] = []

    @torch.inference_mode()
    def warm(self, batch: int, guesses: int) -> None:
        """Record steps of all sizes, the largest first, into whose memory the others fit, then the smallest on."""
        super().warm(batch, guesses)
        self.recordings.clear()
        self._links = list(_links(self.model))
        self._sizes = sizes(self.pages.context, batch, guesses)
        if not self._same():
            return
        *others, largest = sorted(self._shapes(), key=lambda shape: sum(shape.sizes))
        with _kept(self.pages):
            for shape in (largest, *others):
                try:
                    recording = Recording(self.model, self.pages, shape, self.record)
                except torch.OutOfMemoryError:
                    continue
                except RuntimeError:  # it waits for a number, as experts do
                    break
                self.recordings[shape] = recording
                if self.record.full:
                    break

    @torch.inference_mode()
    def hidden(self, parts: Sequence[Part], skipper: Skipper | None = None) -> Tensor:
        """As `Eager.hidden`."""
        if skipper is None and self.recordings and self._same():
            stretches = [Stretch(part.table, part.past, part.fed, part.draft.parents) for part in parts]
            tiles, *others = cut(stretches)
            shape = None if others else self._holding(tiles)
            if shape and (recording := self.recordings.get(shape)):
                self.replayed += 1
                return recording.hidden(parts, stretches, tiles)
        return super().hidden(parts, skipper)

    def _shapes(self) -> Iterator[Shape]:
        """What to record: tables of more pages together than twice the pool's would be nearly empty, whatever runs."""
        (rows, tiles, pages), most = self._sizes, 2 * len(self.pages.data)
        return (_shape(r, a, n) for r in rows for a in tiles for n in pages if n == pages[0] or a * n <= most)

    def _holding(self, tiles: Sequence[Tile]) -> Shape | None:
        """The smallest of all sizes that has room for tiles."""
        wanted = max(tile.stop - tile.first for tile in tiles), len(tiles), tiles[0].pages
        at = [bisect_left(sizes, size) for sizes, size in zip(self._sizes, wanted, strict=True)]
        if any(n == len(sizes) for n, sizes in zip(at, self._sizes, strict=True)):
            return None
        return _shape(*(sizes[n] for n, sizes in zip(at, self._sizes, strict=True)))

    def _same(self) -> bool:
        """Whether the model would do now what was recorded. What was swapped for good ends all recordings."""
        for holder, name, thing in self._links:
            now = holder.get(name)
            if isinstance(now, Banked):
                if not now.idle:
                    return False
                now = now.base
            if now is not thing:
                self.recordings.clear()
                return False
        return not any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())


def sizes(context: int, batch: int, guesses: int) -> tuple[list[int], list[int], list[int]]:
    """What steps are recorded for: new tokens of a sequence, sequences, pages of a table, each rising."""
    pages = -(-context // PAGE)
    tables = [SHORTEST << n for n in range(pages.bit_length()) if SHORTEST << n < pages]
    rows = sorted({1, min(guesses + 1, FEW)})
    return rows, sorted({padded(n + 1) for n in range(batch)}), [*tables, pages]


def runner(device: str, room_bytes: int) -> Callable[[Decoder, Pages], Eager]:
    """What makes an engine's runner: on a GPU one that compiles, and records within so many bytes."""
    return partial(Recorded, record=CudaGraphs(room_bytes), compiled=Compiled()) if device == "cuda" else Eager


@contextmanager
def _kept(pages: Pages) -> Iterator[None]:
    """What is run inside, on nobody's tokens, may write to the pool's first block."""
    first = pages.data[0].clone()
    yield
    pages.data[0].copy_(first)


def _shape(rows: int, tiles: int, pages: int) -> Shape:
    return Shape(rows * tiles, (Group(rows, (pages,) * tiles),))


def _links(model: Decoder) -> Iterator[tuple[dict, str, object]]:
    """All that a step consists of, as (where it hangs, its name, what hangs there), what banks stand around in place of
    these."""
    for module in model.modules():
        for holder in (module._modules, module._buffers, module._parameters):
            for name, thing in holder.items():
                yield holder, name, thing.base if isinstance(thing, Banked) else thing
