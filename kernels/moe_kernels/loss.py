"""Cross-entropy of a linear head without the full logits, and load counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.checks import autocasts
from moe_kernels.choice import takes_triton
from moe_kernels.loss_softmax import VocabularyPart, part_softmax_, scratch_for, softmax_
from moe_kernels.native import dense

# Logits that exist at a time unless the caller says otherwise, but never fewer than those of so many tokens: each
# chunk's weight gradient is added to a (V, D) sum, which must cost less than the products. A GPU needs larger products.
CHUNK_LOGITS = 2**23
CHUNK_LOGITS_GPU = 2**28
CHUNK_TOKENS = 256


class _How(NamedTuple):
    """native: the compiled products. triton: the softmax is a Triton kernel, the products torch's."""

    ignore_index: int
    chunk: int
    part: VocabularyPart | None
    native: bool
    triton: bool


class _LinearCrossEntropy(torch.autograd.Function):
    """For the summed loss the gradients are made in forward, beside the logits they come from: the gradient from above
    is one number, applied in backward. For per-token losses backward computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, summed: bool, train: bool, how: _How
    ) -> Tensor:
        ctx.how, ctx.summed, ctx.dtype = how, summed, h_TD.dtype
        need_h, need_w = ctx.needs_input_grad[:2] if summed and train else (False, False)
        above_T = h_TD.new_ones(len(h_TD), dtype=_wide(h_TD.dtype)) if need_h or need_w else None
        losses_T, grad_h, grad_w = _run(h_TD, w_VD, targets_T, above_T, need_h, need_w, how)
        if how.part is not None:
            losses_T = losses_T * how.part.own_T
        if summed:
            ctx.save_for_backward(grad_h, grad_w)
            return losses_T.sum()
        ctx.save_for_backward(h_TD, w_VD, targets_T)
        return losses_T

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.summed:
            grads = [None if g is None else _scaled(g, above[0], ctx.dtype) for g in ctx.saved_tensors]
        else:
            part: VocabularyPart | None = ctx.how.part
            # The losses of tokens that are reported elsewhere have their gradient from above there.
            above_T = above[0] if part is None else part.gather(above[0] * part.own_T).sum(0)
            h_TD, w_VD, targets_T = ctx.saved_tensors
            need_h, need_w = ctx.needs_input_grad[:2]
            _, *grads = _run(h_TD, w_VD, targets_T, above_T, need_h, need_w, ctx.how)
            grads = [None if g is None else g.to(ctx.dtype) for g in grads]
        return *grads, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.promote_types(dtype, torch.float32)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _run(
    h_TD: Tensor, w_VD: Tensor, targets_T: Tensor, above_T: Tensor | None, need_h: bool, need_w: bool, how: _How
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (T,), and the gradients of <above, losses> in h (its dtype) and in w (float32 or wider), where needed."""
    if autocasts(h_TD.device):
        with torch.autocast(h_TD.device.type, enabled=False):
            return _run(h_TD, w_VD, targets_T, above_T, need_h, need_w, how)
    T, V = len(h_TD), len(w_VD)
    valid_T = targets_T != how.ignore_index
    targets_T1 = targets_T.where(valid_T, 0)[:, None]
    above_T1 = None if above_T is None else (above_T * valid_T)[:, None]
    losses_T1 = h_TD.new_empty((T, 1), dtype=_wide(h_TD.dtype))
    logits = h_TD.new_empty(min(how.chunk, T), V)
    grad_h = torch.empty_like(h_TD) if need_h else None
    grad_w = None
    for start in range(0, T, how.chunk):
        rows = slice(start, min(start + how.chunk, T))
        h, p, above = h_TD[rows], logits[: min(how.chunk, T - start)], None if above_T1 is None else above_T1[rows]
        dense.times_transposed(h, w_VD, out=p) if how.native else torch.mm(h, w_VD.t(), out=p)
        _softmax_(p, targets_T1[rows], above, losses_T1[rows], how)
        if grad_h is not None:
            dense.times(p, w_VD, out=grad_h[rows]) if how.native else torch.mm(p, w_VD, out=grad_h[rows])
        if need_w:
            grad_w = _add_product(grad_w, p, h, how)
    if need_w and grad_w is None:
        grad_w = torch.zeros_like(w_VD, dtype=losses_T1.dtype)
    return losses_T1[:, 0] * valid_T, grad_h, grad_w


def _softmax_(p: Tensor, targets: Tensor, above: Tensor | None, losses: Tensor, how: _How) -> None:
    """``softmax_``, by what ``how`` says."""
    if how.part is not None:
        part_softmax_(p, targets - how.part.first, above, losses, scratch_for(p, losses.dtype), how.part.gather)
    elif how.triton:
        from moe_kernels.gpu.loss import softmax_ as triton_softmax_  # needs triton

        triton_softmax_(p, targets, above, losses)
    elif how.native:
        dense.softmax_(p, targets, above, losses)
    else:
        softmax_(p, targets, above, losses, scratch_for(p, losses.dtype))


def _add_product(total: Tensor | None, p: Tensor, h: Tensor, how: _How) -> Tensor:
    """total + p^T h in float32 or wider; ``total`` is overwritten."""
    if how.native:
        to = p.new_empty(p.shape[1], h.shape[1], dtype=_wide(p.dtype)) if total is None else total
        return dense.transposed_times(p, h, to, add=total is not None)
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
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits ``h_TD @ w_VD.T``, in nats, without ever holding the logits of all tokens.

    h_TD (T, D) and w_VD (V, D) share a dtype; targets_T (T,) int64, ``ignore_index`` where a token does not count.
    chunk: tokens whose logits exist at a time; None: as many as make 8 million logits (on a GPU 256 million), at least
        256.
    Returns the sum over tokens (a scalar) or, with ``reduction="none"``, the loss of each (T,), zero where ignored. It,
    the softmax and all sums are float32, or float64 for float64 inputs; under torch.autocast too.

    part: w_VD has the weights of some classes only; h_TD and targets_T are the same everywhere. The result is the share
    of the tokens ``part.own_T`` (zero for the others), the gradients are those of all shares together: complete in the
    weights here; in h_TD, to be summed over the parts. With "sum", the gradient from above must be the same everywhere.
    backend: one of ``OP_BACKENDS``. "triton" makes the softmax of a chunk and its gradient in one kernel, in place; a
    ``part``'s stay torch's. On CPU all is compiled, where it can be.

    Raises:
        ValueError: shapes, dtypes or targets do not fit (targets are looked at on CPU only), or ``reduction`` is
            neither "sum" nor "none"; the backend is unknown or cannot run here.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction is 'sum' or 'none', not {reduction!r}")
    if (
        h_TD.dim() != 2
        or w_VD.dim() != 2
        or h_TD.shape[1] != w_VD.shape[1]
        or targets_T.shape != h_TD.shape[:1]
        or len(w_VD) == 0
    ):
        raise ValueError(
            f"linear_cross_entropy needs h (T, D), w (V, D) and targets (T,), V > 0, not {tuple(h_TD.shape)}, "
            f"{tuple(w_VD.shape)} and {tuple(targets_T.shape)}"
        )
    if h_TD.dtype != w_VD.dtype:
        raise ValueError(f"linear_cross_entropy needs one dtype, but h is {h_TD.dtype} and w is {w_VD.dtype}")
    if targets_T.dtype != torch.int64:
        raise ValueError(f"targets are int64, not {targets_T.dtype}")
    V = len(w_VD) if part is None else part.classes
    most = CHUNK_LOGITS_GPU if h_TD.device.type == "cuda" else CHUNK_LOGITS
    chunk = max(CHUNK_TOKENS, most // max(len(w_VD), 1)) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is at least 1 token, not {chunk}")
    if targets_T.device.type == "cpu":
        wrong_T = ((targets_T < 0) | (targets_T >= V)) & (targets_T != ignore_index)
        if wrong_T.any():
            first = int(targets_T[wrong_T][0])
            raise ValueError(f"targets must be class numbers below {V} or {ignore_index}; one is {first}")
    triton = takes_triton("linear_cross_entropy", backend, h_TD, w_VD, targets_T)
    native = not triton and dense.takes_native(h_TD, w_VD, len(h_TD))
    if native or triton:
        h_TD, w_VD = h_TD.contiguous(), w_VD.contiguous()
    how = _How(ignore_index, chunk, part, native, triton)
    return _LinearCrossEntropy.apply(h_TD, w_VD, targets_T, reduction == "sum", torch.is_grad_enabled(), how)


def token_counts(ids: Tensor, n: int) -> Tensor:
    """How often each id 0 .. n-1 occurs in ``ids`` (any shape, integers); int64 (n,). Ids outside are not counted."""
    ids = ids.reshape(-1)
    known = ids.clamp(min=-1, max=n) + 1
    return torch.bincount(known, minlength=n + 2)[1 : n + 1]
