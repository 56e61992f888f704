"""Forward mode: a tangent goes along with each tensor through the forward pass (`torch.autograd.forward_ad`).

Our own autograd functions say how gradients come back, and nothing of tangents. Where tangents flow, their forward pass
runs as what it is made of, torch's operators, whose tangents torch knows.
"""

from typing import Any

from torch.autograd import Function, forward_ad


class _NoContext:
    """What a forward pass notes for a backward pass that will not be."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *_: Any) -> None: ...
    def mark_dirty(self, *_: Any) -> None: ...
    def mark_non_differentiable(self, *_: Any) -> None: ...
    def set_materialize_grads(self, _: bool) -> None: ...


def tangents_flow() -> bool:
    """Whether forward mode is on."""
    return forward_ad._current_level >= 0


def apply(function: type[Function], *inputs: Any) -> Any:
    """`function.apply(*inputs)`, in forward mode too; its forward pass may then use no `out=`."""
    return function.forward(_NoContext(), *inputs) if tangents_flow() else function.apply(*inputs)
