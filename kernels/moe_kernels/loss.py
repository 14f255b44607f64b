"""Cross-entropy of a linear head without the full logits, and load counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels.native import dense

# Logits that exist at a time unless the caller says otherwise, but never fewer than those of so many tokens: each
# chunk's weight gradient is added to a (V, D) sum, which must cost less than the products.
CHUNK_LOGITS = 2**23
CHUNK_TOKENS = 256
# Logits that the softmax works on at a time, so that its passes find them in the cache.
BLOCK_LOGITS = 2**20


@dataclass(frozen=True)
class VocabularyPart:
    """The classes whose weights are here, when the others are elsewhere; everywhere are the same tokens and targets.

    first: the first class here. classes: V, their number everywhere. own_T: bool (T,), the tokens whose losses are
    reported here; every token is reported somewhere, once.
    gather: a tensor -> that of every part, stacked in a new first dimension, without autograd. Called equally often
    with equal shapes everywhere, in forward and in backward.
    """

    first: int
    classes: int
    own_T: Tensor
    gather: Callable[[Tensor], Tensor]


class _LinearCrossEntropy(torch.autograd.Function):
    """For the summed loss the gradients are made in forward, beside the logits they come from: the gradient from above
    is one number, applied in backward. For per-token losses backward computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        w_VD: Tensor,
        targets_T: Tensor,
        ignore_index: int,
        chunk: int,
        summed: bool,
        train: bool,
        part: VocabularyPart | None,
    ) -> Tensor:
        ctx.ignore_index, ctx.chunk, ctx.summed, ctx.dtype, ctx.part = ignore_index, chunk, summed, h_TD.dtype, part
        need_h, need_w = ctx.needs_input_grad[:2] if summed and train else (False, False)
        above_T = h_TD.new_ones(len(h_TD), dtype=_wide(h_TD.dtype)) if need_h or need_w else None
        losses_T, grad_h, grad_w = _run(h_TD, w_VD, targets_T, ignore_index, chunk, above_T, need_h, need_w, part)
        if part is not None:
            losses_T = losses_T * part.own_T
        if summed:
            ctx.save_for_backward(grad_h, grad_w)
            return losses_T.sum()
        ctx.save_for_backward(h_TD, w_VD, targets_T)
        return losses_T

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.summed:
            grads = [None if g is None else _scaled(g, above[0], ctx.dtype) for g in ctx.saved_tensors]
        else:
            h_TD, w_VD, targets_T = ctx.saved_tensors
            need_h, need_w = ctx.needs_input_grad[:2]
            # The losses of tokens that are reported elsewhere have their gradient from above there.
            above_T = above[0] if ctx.part is None else ctx.part.gather(above[0] * ctx.part.own_T).sum(0)
            _, *grads = _run(h_TD, w_VD, targets_T, ctx.ignore_index, ctx.chunk, above_T, need_h, need_w, ctx.part)
            grads = [None if g is None else g.to(ctx.dtype) for g in grads]
        return *grads, None, None, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.promote_types(dtype, torch.float32)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _run(
    h_TD: Tensor,
    w_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    chunk: int,
    above_T: Tensor | None,
    need_h: bool,
    need_w: bool,
    part: VocabularyPart | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (T,), and the gradients of <above, losses> in h (its dtype) and in w (float32 or wider), where needed."""
    T, V = len(h_TD), len(w_VD)
    native = dense.takes_native(h_TD, w_VD, T)
    if native:
        h_TD, w_VD = h_TD.contiguous(), w_VD.contiguous()
    valid_T = targets_T != ignore_index
    targets_T1 = targets_T.where(valid_T, 0)[:, None]
    above_T1 = None if above_T is None else (above_T * valid_T)[:, None]
    losses_T1 = h_TD.new_empty((T, 1), dtype=_wide(h_TD.dtype))
    logits = h_TD.new_empty(min(chunk, T), V)
    scratch = logits if logits.dtype == losses_T1.dtype else losses_T1.new_empty(max(1, BLOCK_LOGITS // V), V)
    grad_h = torch.empty_like(h_TD) if need_h else None
    grad_w = None
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        p = logits[: rows.stop - start]
        if native:
            dense.times_transposed(h_TD[rows], w_VD, out=p)
        else:
            torch.mm(h_TD[rows], w_VD.t(), out=p)
        above = None if above_T1 is None else above_T1[rows]
        if part is None and native:
            dense.softmax_(p, targets_T1[rows], above, losses_T1[rows])
        elif part is None:
            _softmax_(p, targets_T1[rows], above, losses_T1[rows], scratch)
        else:
            _part_softmax_(p, targets_T1[rows] - part.first, above, losses_T1[rows], scratch, part.gather)
        if grad_h is not None:
            dense.times(p, w_VD, out=grad_h[rows]) if native else torch.mm(p, w_VD, out=grad_h[rows])
        if need_w and native:
            to = torch.empty_like(w_VD, dtype=losses_T1.dtype) if grad_w is None else grad_w
            grad_w = dense.transposed_times(p, h_TD[rows], to, add=grad_w is not None)
        elif need_w:
            grad_w = _add_product(grad_w, p, h_TD[rows])
    if need_w and grad_w is None:
        grad_w = torch.zeros_like(w_VD, dtype=losses_T1.dtype)
    return losses_T1[:, 0] * valid_T, grad_h, grad_w


def _softmax_(logits: Tensor, targets: Tensor, above: Tensor | None, losses: Tensor, scratch: Tensor) -> None:
    """Write the losses (c, 1) of ``logits`` (c, V); replace the logits by the gradient of <above, losses>, if given.

    targets (c, 1). scratch: float32 or wider, with room for a block of rows, or the storage of logits itself.
    """
    V = logits.shape[1]
    block = max(1, BLOCK_LOGITS // V)
    for start in range(0, len(logits), block):
        rows = slice(start, start + block)
        part = logits[rows]
        x = part if part.dtype == scratch.dtype else scratch[: len(part)].copy_(part)
        x.sub_(x.amax(dim=1, keepdim=True))
        at_target = x.gather(1, targets[rows])
        total = x.exp_().sum(dim=1, keepdim=True)
        torch.sub(total.log(), at_target, out=losses[rows])
        if above is not None:
            x.mul_(above[rows] / total).scatter_add_(1, targets[rows], -above[rows])
            if x is not part:
                part.copy_(x)


def _part_softmax_(
    logits: Tensor,
    targets: Tensor,
    above: Tensor | None,
    losses: Tensor,
    scratch: Tensor,
    gather: Callable[[Tensor], Tensor],
) -> None:
    """``_softmax_`` where ``logits`` (c, v) are those of some classes; a target may be below 0 or above v - 1.

    The parts exchange, per token, their largest logit, the sum of exponentials beside it and the target's logit.
    """
    c, v = logits.shape
    block = max(1, BLOCK_LOGITS // v)
    blocks = [slice(start, start + block) for start in range(0, c, block)]
    is_here = (targets >= 0) & (targets < v)
    targets = targets.where(is_here, 0)
    largest, total, at_target = stats = losses.new_empty(3, c, 1)
    for rows in blocks:
        x = logits[rows].to(losses.dtype)
        torch.amax(x, dim=1, keepdim=True, out=largest[rows])
        torch.sum(torch.sub(x, largest[rows]).exp_(), dim=1, keepdim=True, out=total[rows])
        torch.gather(x, 1, targets[rows], out=at_target[rows])
    at_target.masked_fill_(~is_here, 0)  # it is elsewhere, and the sum over the parts finds it
    largest_P, total_P, at_target_P = gather(stats).unbind(1)
    largest = largest_P.amax(dim=0)
    total = (total_P * (largest_P - largest).exp()).sum(dim=0)
    torch.sub(total.log(), at_target_P.sum(dim=0) - largest, out=losses)
    if above is None:
        return
    above_here = above * is_here
    for rows in blocks:
        part = logits[rows]
        x = part if part.dtype == scratch.dtype else scratch[: len(part)].copy_(part)
        x.sub_(largest[rows]).exp_().mul_(above[rows] / total[rows])
        x.scatter_add_(1, targets[rows], -above_here[rows])
        if x is not part:
            part.copy_(x)


def _add_product(total: Tensor | None, p: Tensor, h: Tensor) -> Tensor:
    """total + p^T h in float32 or wider; ``total`` is overwritten."""
    if p.dtype == _wide(p.dtype):
        return torch.mm(p.t(), h) if total is None else total.addmm_(p.t(), h)
    product = torch.mm(p.t(), h)
    return product.to(_wide(p.dtype)) if total is None else total.add_(product)


def linear_cross_entropy(
    h_TD: Tensor,
    w_VD: Tensor,
    targets_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    reduction: str = "sum",
    part: VocabularyPart | None = None,
) -> Tensor:
    """Cross-entropy of the logits ``h_TD @ w_VD.T``, in nats, without ever holding the logits of all tokens.

    h_TD (T, D) and w_VD (V, D) share a dtype; targets_T (T,) int64, ``ignore_index`` where a token does not count.
    chunk: tokens whose logits exist at a time; None: as many as make 8 million logits, at least 256.
    Returns the sum over tokens (a scalar) or, with ``reduction="none"``, the loss of each (T,), zero where ignored. It,
    the softmax and all sums are float32, or float64 for float64 inputs.

    part: w_VD has the weights of some classes only; h_TD and targets_T are the same everywhere. The result is the share
    of the tokens ``part.own_T`` (zero for the others), the gradients are those of all shares together: complete in the
    weights here; in h_TD, to be summed over the parts. With "sum", the gradient from above must be the same everywhere.

    Raises:
        ValueError: shapes, dtypes or targets do not fit (targets are looked at on CPU only), or ``reduction`` is
            neither "sum" nor "none".
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction is 'sum' or 'none', not {reduction!r}")
    if h_TD.dim() != 2 or w_VD.dim() != 2 or h_TD.shape[1] != w_VD.shape[1] or targets_T.shape != h_TD.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy needs h (T, D), w (V, D) and targets (T,), not {tuple(h_TD.shape)}, "
            f"{tuple(w_VD.shape)} and {tuple(targets_T.shape)}"
        )
    if h_TD.dtype != w_VD.dtype:
        raise ValueError(f"linear_cross_entropy needs one dtype, but h is {h_TD.dtype} and w is {w_VD.dtype}")
    V = len(w_VD) if part is None else part.classes
    chunk = max(CHUNK_TOKENS, CHUNK_LOGITS // max(len(w_VD), 1)) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is at least 1 token, not {chunk}")
    if targets_T.device.type == "cpu":
        wrong_T = ((targets_T < 0) | (targets_T >= V)) & (targets_T != ignore_index)
        if wrong_T.any():
            first = int(targets_T[wrong_T][0])
            raise ValueError(f"targets must be class numbers below {V} or {ignore_index}; one is {first}")
    return _LinearCrossEntropy.apply(
        h_TD, w_VD, targets_T, ignore_index, chunk, reduction == "sum", torch.is_grad_enabled(), part
    )


def token_counts(ids: Tensor, n: int) -> Tensor:
    """How often each id 0 .. n-1 occurs in ``ids`` (any shape, integers); int64 (n,). Ids outside are not counted."""
    ids = ids.reshape(-1)
    known = ids.clamp(min=-1, max=n) + 1
    return torch.bincount(known, minlength=n + 2)[1 : n + 1]
