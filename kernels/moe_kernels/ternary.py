"""Ternary weights: each matrix is a scale times -1, 0 or 1, trained through full-precision masters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def absmean(w: Tensor) -> Tensor:
    """The scale of each matrix of ``w`` (..., A, B): its mean magnitude, (..., 1, 1), float32 or wider; no gradient."""
    return w.detach().abs().mean((-2, -1), keepdim=True, dtype=torch.promote_types(w.dtype, torch.float32))


def ternary(w: Tensor, scale: Tensor | None = None) -> Tensor:
    """s * clip(round(w / s), -1, 1) of each matrix of ``w`` (..., A, B), with s = mean |w|: BitNet b1.58 (arXiv
    2402.17764). The gradient passes straight through to ``w``, as if nothing had been rounded.

    scale: (..., 1, 1), where ``w`` is a part of the matrices; None: ``absmean(w)``. Rounded in the wider of both
    dtypes; the result has the dtype of ``w``. A matrix of zeros stays one.
    """
    rounded: Tensor = _Ternary.apply(w, absmean(w) if scale is None else scale)  # type: ignore[no-untyped-call]
    return rounded


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor) -> Tensor:
        signs = (w / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round_().clamp_(-1, 1)
        return signs.mul_(scale).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
