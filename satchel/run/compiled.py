"""The operators between a decoder's products, compiled: on a GPU one to three kernels each instead of two to twenty.

    compiled = Compiled();   with compiled.into(model, pages): ...a few steps, in which it compiles...

Compiled are functions of tensors: RMS norm, rotary positions, gated activation, and what a softmax over pages does
between its two products. No length is fixed in them, so that one graph does for all layers and steps; where torch must
tell one row from many, two. The modules around them stay what they are: hooks, swapped maps, adapters, packed weights,
experts and feed-forwards that are left out find operators that are compiled beside what they do themselves.

Nothing is compiled later, in the midst of requests. What cannot be compiled, for want of Triton or of sizes like it at
the start, runs operator by operator, and the log says so once. Results differ from those in the last bits: what torch
rounds between two operators stays in float32 here. A softmax takes less memory than is rehearsed, which is without it.

No GPU has run this yet; tests/run/test_gpu.py is what the first one should be given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from satchel.model.attention import Attention
from satchel.model.decoder import Decoder
from satchel.model.feedforward import FeedForward
from satchel.model.functional import ACTS, gated, normed, rms_norm, rotate, turned
from satchel.model.norm import RMSNorm
from satchel.model.paged import Pages
from satchel.model.spans import weighed

# N rows, D width, T tokens, H heads, E head dim, R half of the rotated dimensions, S slots, X rows of all heads

log = logging.getLogger("satchel.server")
Compiler = Callable[[torch.fx.GraphModule, Sequence[Any]], Any]  # a backend of torch.compile
Operator = Callable[..., Tensor]
LIMIT = 100  # graphs of one function, over all engines that a process ever has
OPTIONS = {
    "deterministic": True,  # kernels are chosen without a clock, so that every start gives the same bits
    "triton.autotune_pointwise": False,
    "realize_reads_threshold": 100,  # what two passes need is made twice: scores in float32 are never stored
    "realize_opcount_threshold": 1000,
}


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """torch's own compiler."""
    return torch._inductor.compile(graph, list(inputs), options=OPTIONS)


class Compiled:
    """The compiled operators of one model."""

    def __init__(self, compiler: Compiler = inductor) -> None:
        self.compiler, self.graphs = compiler, 0  # compiled so far
        self.told = False  # whether the log has heard of something that is not compiled
        self._open = False
        self._norm, self._turn = self._compile(_norm), self._compile(turned)
        self._gate, self._weigh = self._compile(_gate), self._compile(weighed)

    @contextmanager
    def into(self, model: Decoder, pages: Pages) -> Iterator[None]:
        """Put them into a model; what runs inside is compiled, and later only what is like it runs so."""
        _put(model, pages, self.rms_norm, self.rotate, self.gated, self.weighed)
        self._open = True
        try:
            with torch._dynamo.config.patch(specialize_float=True, recompile_limit=LIMIT):  # a scale is the model's
                yield
        except Exception as fault:  # of kernels that do not start, say
            _put(model, pages, rms_norm, rotate, gated, weighed)
            self._tell(fault)
        finally:
            self._open = False

    def rms_norm(
        self, x: Tensor, weight_D: Tensor, eps: float, *, plus_one: bool = False, late_cast: bool = False
    ) -> Tensor:
        """As `functional.rms_norm`."""
        return self._norm(x.flatten(0, -2), weight_D, eps, plus_one, late_cast or plus_one).view(x.shape)

    def rotate(self, x_BTHE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """As `functional.rotate`."""
        return self._turn(x_BTHE, cos_TR, sin_TR)

    def gated(self, gate: Tensor, up: Tensor, act: str) -> Tensor:
        """As `functional.gated`."""
        return self._gate(gate.flatten(), up.flatten(), act).view(gate.shape)

    def weighed(self, score: Tensor, known_4: Tensor, slot_S: Tensor, *state_and_how: Any) -> Tensor:
        """As `spans.weighed`. All rows lie along one dimension, which is never 1: so one graph does for all shapes."""
        best, share, total, *how = state_and_how
        known_4X = known_4.expand(4, *score.shape[:-1]).flatten(1).contiguous()
        state = best.flatten(), share.flatten(), total.flatten(0, -2)
        return self._weigh(score.flatten(0, -2), known_4X, slot_S, *state, *how).view(score.shape)

    def _compile(self, function: Operator) -> Operator:
        return torch.compile(function, dynamic=True, backend=self._made)

    def _made(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._dynamo.exc import RestartAnalysis  # a second to import

        if not self._open:
            self._tell("nothing like it was compiled at the start")
            return graph.forward
        try:
            made = self.compiler(graph, inputs)
        except RestartAnalysis:  # no fault: torch traces anew
            raise
        except Exception as fault:  # whatever a compiler runs into
            self._tell(fault)
            return graph.forward
        self.graphs += 1
        return made

    def _tell(self, why: Exception | str) -> None:
        if not self.told:
            self.told = True
            fields = {"why": f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why}
            log.warning("operators that could be compiled run one by one", extra={"fields": fields})


def _put(model: Decoder, pages: Pages, norm: Operator, turn: Operator, gate: Operator, weigh: Operator) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.normed = norm
        elif isinstance(module, Attention):
            module.rotate = turn
        elif isinstance(module, FeedForward):
            module.gate = gate
    pages.weighed = weigh


def _norm(x_ND: Tensor, weight_D: Tensor, eps: float, plus_one: bool, late_cast: bool) -> Tensor:
    return normed(x_ND, weight_D, eps, plus_one, late_cast)[0]


def _gate(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return ACTS[act][0](gate) * up
