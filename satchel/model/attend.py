"""Causal attention over keys and values that several query heads may share.

    out[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s],   s <= t,   s > t - window

torch's fused kernels do the plain case, document by document. Sliding windows, soft caps (scores squashed by
cap * tanh(score / cap)) and several new tokens after a cached past run here in blocks of queries: at most BLOCK x S
scores of each head are alive, and the backward pass makes them again. Keeps q, k, v, out and one number a query, as
the fused kernels do.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from satchel.model.functional import wide
from satchel.model.tangent import apply, tangents_flow

# B batch, T queries, S keys (S - T of them before the first query), H query heads, K key heads, G = H / K, E head dim
# Q queries of a block, M = G * Q

BLOCK = 128  # queries
SHORT = 512  # tokens of a document up to which its backward pass runs in float32,
FEW = 2**20  # if its queries are no more numbers than this: the copies are five of that size
aten = torch.ops.aten


def attend(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, *, scale: float, window: int | None = None, cap: float | None = None
) -> Tensor:
    """Out [B, T, H, E]. The queries are the last T of S positions; `window` counts the query itself."""
    queries, keys = q_BTHE.shape[1], k_BSKE.shape[1]
    if cap is None and queries == 1:  # the newest token sees all of what is left
        seen = slice(-min(window or keys, keys), None)
        return _fused(q_BTHE, k_BSKE[:, seen], v_BSKE[:, seen], scale, causal=False)
    if cap is None and queries == keys and (window is None or window >= keys) and not tangents_flow():
        return _causal(q_BTHE, k_BSKE, v_BSKE, (queries,), scale)
    return apply(_Blockwise, q_BTHE, k_BSKE, v_BSKE, scale, window or keys, cap)


def attend_documents(
    q_1NHE: Tensor,
    k_1NKE: Tensor,
    v_1NKE: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """As `attend`, each document of a row by itself; `lengths` sum to N."""
    if cap is None and (window is None or window >= max(lengths)) and not tangents_flow():
        return _causal(q_1NHE, k_1NKE, v_1NKE, lengths, scale)
    documents = zip(*(t.split(lengths, dim=1) for t in (q_1NHE, k_1NKE, v_1NKE)), strict=True)
    return torch.cat([attend(q, k, v, scale=scale, window=window, cap=cap) for q, k, v in documents], dim=1)


def shares(
    q_SHE: Tensor, k_TKE: Tensor, query_S: Tensor, *, scale: float, window: int | None = None, cap: float | None = None
) -> Tensor:
    """The share of attention that some queries of one document, those at `query_S`, give to each of its T tokens.

    The mean over the heads, [S, T] in the type of reductions; the scores of one key head are alive at once.
    """
    groups = q_SHE.shape[1] // k_TKE.shape[1]
    key_T = torch.arange(len(k_TKE), device=k_TKE.device)
    hidden_ST = (key_T > query_S[:, None]) | (key_T <= query_S[:, None] - (window or len(k_TKE)))
    sum_ST = torch.zeros(hidden_ST.shape, dtype=wide(q_SHE.dtype), device=q_SHE.device)
    for q_SGE, k_TE in zip(q_SHE.split(groups, dim=1), k_TKE.unbind(1), strict=True):
        score_SGT = (q_SGE @ k_TE.T).to(sum_ST.dtype).mul_(scale)
        if cap is not None:
            score_SGT.div_(cap).tanh_().mul_(cap)
        sum_ST += score_SGT.masked_fill_(hidden_ST[:, None], -torch.inf).softmax(-1).sum(1)
    return sum_ST.div_(q_SHE.shape[1])


def _causal(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    if q.device.type == "cpu":
        return _OnCPU.apply(q, k, v, lengths, scale)
    documents = zip(*(t.split(lengths, dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([_fused(q, k, v, scale, causal=True) for q, k, v in documents], dim=1)


def _fused(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, scale: float, causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BTHE, k_BSKE, v_BSKE))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)


class _OnCPU(Function):
    """torch's fused kernels on documents that lie in one tensor. Results and gradients are written in place, so that
    packing costs no copy. Short documents go backward in float32, where the kernel is faster: 1.2 times at 256 tokens,
    5 times at 64.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        log_sums = []
        for part in _parts(lengths):
            heads = (t[:, part].transpose(1, 2) for t in (q, k, v))
            result, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, scale=scale)
            out[:, part] = result.transpose(1, 2)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *log_sums = ctx.saved_tensors
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        for part, log_sum in zip(_parts(ctx.lengths), log_sums, strict=True):
            dtype = wide(q.dtype) if part.stop - part.start <= SHORT and q[:, part].numel() <= FEW else q.dtype
            heads = (t[:, part].transpose(1, 2).to(dtype) for t in (grad, q, k, v, out))
            results = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *heads, log_sum, 0.0, True, scale=ctx.scale
            )
            for whole, result in zip(grads, results, strict=True):
                whole[:, part] = result.transpose(1, 2)
        return *grads, None, None


def _parts(lengths: tuple[int, ...]) -> list[slice]:
    """Where each document lies in its row."""
    stops = list(accumulate(lengths))
    return [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]


class _Block:
    """The scores of queries [start, stop) and all that follows from them."""

    def __init__(self, start: int, q_BTHE: Tensor, k_BSKE: Tensor, window: int) -> None:
        self.queries = slice(start, min(start + BLOCK, q_BTHE.shape[1]))
        past = k_BSKE.shape[1] - q_BTHE.shape[1]
        self.keys = slice(max(0, past + start - window + 1), past + self.queries.stop)
        device = q_BTHE.device
        query_Q1 = torch.arange(past + start, past + self.queries.stop, device=device)[:, None]
        key_S = torch.arange(self.keys.start, self.keys.stop, device=device)
        self.hidden_QS = (key_S > query_Q1) | (key_S <= query_Q1 - window)
        self.groups = q_BTHE.shape[2] // k_BSKE.shape[2]

    def rows(self, x_BTHE: Tensor) -> Tensor:
        """The block's queries, those that share a key head together: [B, K, M, E]."""
        x_BQKGE = x_BTHE[:, self.queries].unflatten(2, (-1, self.groups))
        return x_BQKGE.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def unrows(self, x_BKME: Tensor) -> Tensor:
        """Back from `rows`: [B, Q, H, E]."""
        return x_BKME.unflatten(2, (self.groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def heads(self, x_BSKE: Tensor) -> Tensor:
        """The keys or values that the block may see: [B, K, S, E]."""
        return x_BSKE[:, self.keys].transpose(1, 2)

    def scores(self, q_BKME: Tensor, k_BKSE: Tensor, scale: float, cap: float | None) -> Tensor:
        """[B, K, M, S], in the type of reductions, -inf where a query may not look."""
        score = (q_BKME @ k_BKSE.mT).to(wide(q_BKME.dtype)).mul_(scale)
        if cap is not None:
            score.div_(cap).tanh_().mul_(cap)
        score.unflatten(2, (self.groups, -1)).masked_fill_(self.hidden_QS, -torch.inf)
        return score


def _blocks(q_BTHE: Tensor, k_BSKE: Tensor, window: int) -> list[_Block]:
    return [_Block(start, q_BTHE, k_BSKE, window) for start in range(0, q_BTHE.shape[1], BLOCK)]


class _Blockwise(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, cap: float | None) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        log_sums = []
        for block in _blocks(q, k, window):
            score = block.scores(block.rows(q), block.heads(k), scale, cap)
            log_sums.append(score.logsumexp(-1, keepdim=True))
            out[:, block.queries] = block.unrows(score.sub_(log_sums[-1]).exp_().to(v.dtype) @ block.heads(v))
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.how = scale, window, cap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *log_sums = ctx.saved_tensors
        scale, window, cap = ctx.how
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=wide(t.dtype)) for t in (k, v))
        for block, log_sum in zip(_blocks(q, k, window), log_sums, strict=True):
            q_BKME, k_BKSE, grad_BKME = block.rows(q), block.heads(k), block.rows(grad)
            score = block.scores(q_BKME, k_BKSE, scale, cap)
            slope = None if cap is None else score.div(cap).square_().neg_().add_(1)  # of the soft cap
            share = score.sub_(log_sum).exp_()
            block.heads(dv).add_(share.to(v.dtype).mT @ grad_BKME)
            inner = torch.linalg.vecdot(grad_BKME.to(share.dtype), block.rows(out).to(share.dtype))
            share.mul_((grad_BKME @ block.heads(v).mT).to(share.dtype).sub_(inner[..., None])).mul_(scale)
            if slope is not None:
                share.mul_(slope.nan_to_num_(neginf=0.0))  # -inf where hidden, and the share there is 0
            share = share.to(q.dtype)
            dq[:, block.queries] = block.unrows(share @ k_BKSE)
            block.heads(dk).add_(share.mT @ q_BKME)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None
