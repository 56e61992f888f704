"""Cross-entropy of a language model's head without its logits: the sum over tokens of -log softmax(x W^T)[target].

The gradient is made in the forward pass, while the logits of a piece are at hand, and only scaled in the backward pass.

Only x needs a gradient (adapters, a frozen head): tokens go by in chunks; each chunk's logits give its loss and its
gradient. Three products of N x V x D, as without chunks.

The weight trains too: a sum over chunks of its gradient would have to be kept in float32 (4 V D bytes: more than the
logits themselves in small batches) or be rounded at every chunk. Instead the chunks give each token's log-sum first;
then the vocabulary goes by in slices, and each slice's rows of the gradient are one product over all tokens, as
precise as without chunks and 2 V D bytes in bfloat16. The price is a fourth product.

At most chunk x V logits are alive, in float32 and in x's type: 1.5 x 4 x chunk x V bytes in bfloat16.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from satchel.model.tangent import tangents_flow

# N tokens, D width, V vocabulary, C tokens of a chunk, S vocabulary entries of a slice; M either

IGNORED = -100  # target without loss
WHOLE = 32  # rows; a product of every new number of rows costs oneDNN's caches half a megabyte that it never gives back


class _Scratch:
    """Room for one piece of logits, used again for each: in the type of reductions, and in the weight's type.

    Fresh memory for every piece would cost more time than its arithmetic: the system clears it page by page.
    """

    def __init__(self, numbers: int, like: Tensor) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        self.low = like.new_empty(numbers)
        self.wide = self.low if like.dtype == wide else like.new_empty(numbers, dtype=wide)

    def take(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The two buffers as [rows, columns]; one and the same if the types are equal."""
        return tuple(t[: rows * columns].view(rows, columns) for t in (self.wide, self.low))  # type: ignore[return-value]


class _Head(NamedTuple):
    """What turns hidden states into logits."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None

    def rows(self, part: slice) -> "_Head":
        """The head of a slice of the vocabulary."""
        return self._replace(weight_VD=self.weight_VD[part], bias_V=None if self.bias_V is None else self.bias_V[part])

    def logits(self, x_CD: Tensor, scratch: _Scratch) -> tuple[Tensor, Tensor]:
        """The logits in the type of reductions, and a buffer of their shape in x's type; one and the same if equal."""
        logit_CV, low_CV = scratch.take(len(x_CD), len(self.weight_VD))
        torch.mm(x_CD, self.weight_VD.T, out=low_CV)
        if low_CV.dtype != logit_CV.dtype:
            logit_CV.copy_(low_CV)
        if self.scale != 1:
            logit_CV.mul_(self.scale)
        if self.bias_V is not None:
            logit_CV.add_(self.bias_V)
        if self.cap is not None:
            logit_CV.div_(self.cap).tanh_().mul_(self.cap)
        return logit_CV, low_CV

    def plain_logits(self, x_CD: Tensor) -> Tensor:
        """The logits in memory of their own, by operators that know tangents."""
        logit_CV = (x_CD @ self.weight_VD.T).to(torch.promote_types(x_CD.dtype, torch.float32))
        if self.scale != 1:
            logit_CV = logit_CV * self.scale
        if self.bias_V is not None:
            logit_CV = logit_CV + self.bias_V
        return logit_CV if self.cap is None else (logit_CV / self.cap).tanh() * self.cap

    def slope(self, logit_CV: Tensor) -> Tensor | None:
        """Derivative of the soft cap, given what it made."""
        return None if self.cap is None else (logit_CV / self.cap).square_().neg_().add_(1)


def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    chunk: int = 128,
    softcap: float | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The sum of the loss over the targets that are not -100, a float32 scalar (float64 for float64).

    Logits are cap * tanh((scale * x W^T + bias) / cap), without the soft cap if it is None. Rows whose target is -100
    are left out of all products (on fake tensors, whose values are unknown, they count).
    """
    if softcap is not None:
        chunk = max(1, chunk // 2)  # the cap's slope is one more buffer
    kept_M, spare = _kept(targets_N)
    if kept_M is not None:
        x_ND, targets_N = x_ND[kept_M], targets_N[kept_M]
    if tangents_flow():
        return _by_operators(x_ND, _Head(weight_VD, bias, scale, softcap), targets_N, chunk, spare)
    return _CrossEntropy.apply(x_ND, weight_VD, bias, targets_N, chunk, scale, softcap, spare, torch.is_grad_enabled())


def _kept(targets_N: Tensor) -> tuple[Tensor | None, int]:
    """The rows with a loss, and how many at their end are there only to fill up a multiple of WHOLE.

    None if that is all rows, or unknown.
    """
    if targets_N.is_meta or isinstance(targets_N, FakeTensor):
        return None, 0
    kept_M = (targets_N != IGNORED).nonzero().flatten()
    if len(kept_M) == len(targets_N) or not len(kept_M):
        return (None, 0) if len(kept_M) else (kept_M, 0)
    spare = -len(kept_M) % WHOLE
    return torch.cat([kept_M, kept_M[:1].expand(spare)]), spare


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        chunk: int,
        scale: float,
        cap: float | None,
        spare: int,
        recorded: bool,
    ) -> Tensor:
        head = _Head(weight_VD, bias_V, scale, cap)
        needs_x, needs_weight, needs_bias = (recorded and needed for needed in ctx.needs_input_grad[:3])
        of_head = needs_weight or needs_bias
        dx_ND = torch.empty_like(x_ND) if needs_x and not of_head else None
        loss_N, log_sum_N = _by_tokens(x_ND, head, targets_N, chunk, dx_ND)
        grads = (dx_ND, None, None)
        if spare:  # rows that stand in twice count once
            loss_N[-spare:], log_sum_N[-spare:] = 0, torch.inf
            targets_N = targets_N.index_fill(0, torch.arange(-spare, 0, device=x_ND.device) + len(x_ND), IGNORED)
            if dx_ND is not None:
                dx_ND[-spare:] = 0
        if of_head:
            grads = _by_vocabulary(x_ND, head, targets_N, log_sum_N, chunk, (needs_x, needs_weight, needs_bias))
        ctx.save_for_backward(*grads)
        return loss_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The saved gradients are ours alone, and are handed over unless the graph is to be walked again.
        # torch's stub lacks the module.
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
        scaled = (t if t is None else t * grad if again else t.mul_(grad) for t in ctx.saved_tensors)
        return *scaled, None, None, None, None, None, None


def _by_operators(x_ND: Tensor, head: _Head, targets_N: Tensor, chunk: int, spare: int) -> Tensor:
    """The summed loss of all but the spare rows, in forward mode."""
    if spare:
        x_ND, targets_N = x_ND[:-spare], targets_N[:-spare]
    pieces = zip(x_ND.split(chunk), targets_N.split(chunk), strict=True)
    return torch.stack([_one_piece(head.plain_logits(x_CD), targets_C) for x_CD, targets_C in pieces]).sum()


def _one_piece(logit_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The summed loss of some tokens, whose logits are used up."""
    picked_C = logit_CV.gather(1, targets_C.clamp_min(0)[:, None])[:, 0]
    top_C1 = logit_CV.detach().amax(1, keepdim=True)
    loss_C = logit_CV.sub_(top_C1).exp_().sum(1).log() + top_C1[:, 0] - picked_C
    return torch.where(targets_C == IGNORED, 0, loss_C).sum()


def _by_tokens(x_ND: Tensor, head: _Head, targets_N: Tensor, chunk: int, dx_ND: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and log-sum of each token, and the gradient of x into dx_ND unless that is None."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    loss_N, log_sum_N = torch.empty(2, len(x_ND), dtype=wide, device=x_ND.device)
    scratch = _Scratch(min(chunk, len(x_ND)) * len(head.weight_VD), x_ND)
    for start in range(0, len(x_ND), chunk):
        part = slice(start, start + chunk)
        logit_CV, low_CV = head.logits(x_ND[part], scratch)
        target_C1 = targets_N[part, None]
        picked_C1 = logit_CV.gather(1, target_C1)
        slope_CV = head.slope(logit_CV) if dx_ND is not None else None
        torch.log_softmax(logit_CV, -1, out=logit_CV)
        loss_C1 = logit_CV.gather(1, target_C1).neg_()
        loss_N[part], log_sum_N[part] = loss_C1[:, 0], (picked_C1 + loss_C1)[:, 0]
        if dx_ND is not None:
            logit_CV.exp_().scatter_add_(1, target_C1, logit_CV.new_full((1, 1), -1).expand_as(target_C1))
            torch.mm(_rounded(logit_CV, low_CV, slope_CV), head.weight_VD, out=dx_ND[part])
    if dx_ND is not None and head.scale != 1:
        dx_ND.mul_(head.scale)
    return loss_N, log_sum_N


def _rounded(dlogit: Tensor, low: Tensor, slope: Tensor | None) -> Tensor:
    """The gradient of the logits before the soft cap, in the buffer `low`."""
    if slope is not None:
        dlogit.mul_(slope)
    return low if low.dtype == dlogit.dtype else low.copy_(dlogit)


def _by_vocabulary(
    x_ND: Tensor, head: _Head, targets_N: Tensor, log_sum_N: Tensor, chunk: int, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, those that are needed."""
    vocab = len(head.weight_VD)
    width = min(vocab, max(1, chunk * vocab // max(1, len(x_ND))))
    sources = (x_ND, head.weight_VD, head.bias_V)
    dx_ND, dw_VD, db_V = (
        torch.empty_like(t) if t is not None and n else None for t, n in zip(sources, needs, strict=True)
    )
    scratch = _Scratch(len(x_ND) * width, x_ND)
    sum_ND = None if dx_ND is None else torch.zeros_like(x_ND, dtype=log_sum_N.dtype)
    for start in range(0, vocab, width):
        part = slice(start, min(start + width, vocab))
        rows = head.rows(part)
        dlogit_NS, low_NS = rows.logits(x_ND, scratch)
        slope_NS = rows.slope(dlogit_NS)
        dlogit_NS.sub_(log_sum_N[:, None]).exp_()
        _subtract_targets(dlogit_NS, targets_N, part)
        low_NS = _rounded(dlogit_NS, low_NS, slope_NS)
        if db_V is not None:
            torch.sum(low_NS, 0, out=db_V[part])
        if dw_VD is not None:
            torch.mm(low_NS.T, x_ND, out=dw_VD[part])
        if sum_ND is not None:
            sum_ND.add_(low_NS @ rows.weight_VD)
    for scaled in (sum_ND, dw_VD):
        if scaled is not None and head.scale != 1:
            scaled.mul_(head.scale)
    if dx_ND is not None and sum_ND is not None:
        dx_ND.copy_(sum_ND)
    return dx_ND, dw_VD, db_V


def _subtract_targets(share_NS: Tensor, targets_N: Tensor, part: slice) -> None:
    """Takes 1 from each token's target where the slice holds it; shapes do not depend on the data."""
    inside_N = (targets_N >= part.start) & (targets_N < part.stop)
    column_N = (targets_N - part.start).clamp(0, part.stop - part.start - 1)
    share_NS.scatter_add_(1, column_N[:, None], -inside_N.to(share_NS.dtype)[:, None])
