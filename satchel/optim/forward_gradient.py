"""Forward gradient: the exact slope of the loss along a random direction, by one forward pass and no backward pass.

    rho = grad loss(theta) . z, a Jacobian-vector product        g = mean over `directions` of rho z

and from there on as MeZO (see there for `update`), which measures rho by the difference of two losses. Where a
difference is lost in the rounding of bfloat16, this is exact; it is the stronger baseline of the two.

Saves gradients and activations: of these only one and its tangent are alive, while the next operator runs. It spends a
tangent for every parameter that trains, as many bytes as a gradient, a pass about three times as long, and quality as
MeZO does. Limit: every operator has to know its tangent. satchel's decoder does, adapted and packed too; of a model of
your own torch says which operator does not.
Paper: https://arxiv.org/abs/2202.08587; on language models: https://arxiv.org/abs/2402.11592
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from satchel.core.seams import Card
from satchel.optim._directions import estimate
from satchel.optim._shared import decay_groups
from satchel.optim._zeroth import Closure, Part, Zeroth, ZerothStepper


@dataclass(frozen=True, kw_only=True)
class ForwardGradient(Zeroth):
    """Directional derivatives along random directions."""

    card = Card(
        paper="https://arxiv.org/abs/2202.08587",
        saves=("gradients", "activations"),
        spends=("optimizer", "compute", "quality"),
        fidelity="study",
        claim="among ZO methods the best or second on RoBERTa-large and OPT-1.3B with SST-2",
        demo={"directions": 4},
    )

    def build(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], lr: float, seed: int
    ) -> ForwardGradientStepper:
        """A torch optimizer whose step wants a closure; see `ZerothStepper`."""
        groups = decay_groups(named_parameters, self.weight_decay)
        return ForwardGradientStepper(groups, lr, seed, **self.stepper_knobs())


class ForwardGradientStepper(ZerothStepper):
    """State as `ZerothStepper`'s."""

    def slope(self, part: list[Part], which: int, closure: Closure) -> Tensor:
        """The derivative along the direction. Attention runs as torch's own operators, the only ones with tangents."""
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            try:
                for each in part:
                    self._give_tangent(each, which)
                slope = forward_ad.unpack_dual(closure()).tangent
            finally:
                for each in part:
                    self.state[each.p].pop("tangent", None)
            return torch.zeros((), device=part[0].p.device) if slope is None else slope.clone()

    def _give_tangent(self, part: Part, which: int) -> None:
        """Make z the tangent of a parameter, until the level ends. The state names it, as it does all that is kept."""
        flat = part.p.detach().view(-1)
        z_N = estimate(flat, None, torch.ones(1, device=flat.device), *self.draw(part, which))
        part.p.copy_(forward_ad.make_dual(part.p.detach(), z_N.view_as(part.p)))
        self.state[part.p]["tangent"] = forward_ad.unpack_dual(part.p).tangent
