"""Cross-entropy of a linear head without the full logits, and load counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEFAULT_CHUNK = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of every token; the logits of one chunk of tokens exist at a time.

    For the summed loss the gradients are made in forward, beside the logits they come from (the upstream gradient is
    one number, applied in backward). For per-token losses backward computes the logits again.
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
    ) -> Tensor:
        high = torch.promote_types(h_TD.dtype, torch.float32)
        eager = summed and train
        grad_h = torch.empty_like(h_TD) if eager and ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(w_VD, dtype=high) if eager and ctx.needs_input_grad[1] else None
        losses = h_TD.new_empty(h_TD.shape[0], dtype=high)
        ones = h_TD.new_ones(h_TD.shape[0], dtype=high)
        for start in range(0, h_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits, lse, target, valid = _logits(h_TD[rows], w_VD, targets_T[rows], ignore_index, high)
            losses[rows] = (lse - logits.gather(1, target[:, None])[:, 0]) * valid
            if grad_h is not None or grad_w is not None:
                _backward(h_TD, w_VD, rows, logits, lse, target, valid * ones[rows], grad_h, grad_w)
        ctx.ignore_index, ctx.chunk, ctx.summed = ignore_index, chunk, summed
        if summed:
            ctx.save_for_backward(grad_h, None if grad_w is None else grad_w.to(w_VD.dtype))
            return losses.sum()
        ctx.save_for_backward(h_TD, w_VD, targets_T)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.summed:
            grad_h, grad_w = ctx.saved_tensors
            grad_h = None if grad_h is None else (grad_h * grads[0]).to(grad_h.dtype)
            grad_w = None if grad_w is None else (grad_w * grads[0]).to(grad_w.dtype)
            return grad_h, grad_w, None, None, None, None, None
        h_TD, w_VD, targets_T = ctx.saved_tensors
        high = torch.promote_types(h_TD.dtype, torch.float32)
        grad_h = torch.empty_like(h_TD) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(w_VD, dtype=high) if ctx.needs_input_grad[1] else None
        for start in range(0, h_TD.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits, lse, target, valid = _logits(h_TD[rows], w_VD, targets_T[rows], ctx.ignore_index, high)
            _backward(h_TD, w_VD, rows, logits, lse, target, valid * grads[0][rows], grad_h, grad_w)
        return grad_h, None if grad_w is None else grad_w.to(w_VD.dtype), None, None, None, None, None


def _logits(
    h_cD: Tensor, w_VD: Tensor, targets_c: Tensor, ignore_index: int, high: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits (c, V), their logsumexp (c,), targets with ignored ones at 0, 1 where a target counts) of a chunk."""
    logits = torch.mm(h_cD, w_VD.t()).to(high)
    valid = targets_c != ignore_index
    return logits, logits.logsumexp(1), targets_c.where(valid, 0), valid


def _backward(
    h_TD: Tensor,
    w_VD: Tensor,
    rows: slice,
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    scale: Tensor,
    grad_h: Tensor | None,
    grad_w: Tensor | None,
) -> None:
    """Write rows of ``grad_h`` and add to ``grad_w``. ``logits`` is overwritten."""
    p = logits.sub_(lse[:, None]).exp_()
    p.scatter_add_(1, target[:, None], p.new_full((1, 1), -1.0).expand(p.shape[0], 1))
    p = p.mul_(scale[:, None]).to(h_TD.dtype)
    if grad_h is not None:
        torch.mm(p, w_VD, out=grad_h[rows])
    if grad_w is not None:
        grad_w += torch.mm(p.t(), h_TD[rows])


def linear_cross_entropy(
    h_TD: Tensor,
    w_VD: Tensor,
    targets_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int = DEFAULT_CHUNK,
    reduction: str = "sum",
) -> Tensor:
    """Cross-entropy of the logits ``h_TD @ w_VD.T``, in nats, without ever holding the logits of all tokens.

    h_TD (T, D) and w_VD (V, D) share a dtype; targets_T (T,) int64, ``ignore_index`` where a token does not count.
    chunk: tokens whose logits exist at a time. Returns the sum over tokens (a scalar) or, with ``reduction="none"``,
    the loss of each (T,), zero where ignored. It, the softmax and all sums are float32, float64 for float64 inputs.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``reduction`` is neither "sum" nor "none".
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
    if chunk < 1:
        raise ValueError(f"chunk is at least 1 token, not {chunk}")
    return _LinearCrossEntropy.apply(
        h_TD, w_VD, targets_T, ignore_index, chunk, reduction == "sum", torch.is_grad_enabled()
    )


def token_counts(ids: Tensor, n: int) -> Tensor:
    """How often each id 0 .. n-1 occurs in ``ids`` (any shape, integers); int64 (n,). Ids outside are not counted."""
    ids = ids.reshape(-1)
    known = ids.clamp(min=-1, max=n) + 1
    return torch.bincount(known, minlength=n + 2)[1 : n + 1]
