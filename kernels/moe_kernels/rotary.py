"""Rotary position embedding (RoFormer, arXiv 2104.09864) that keeps only its tables for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.choice import takes_triton
from moe_kernels.native import rows


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto") -> Tensor:
    """x with its pairs turned by their angles: (a, b) -> (a cos - b sin, b cos + a sin). Shape and dtype of x.

    x: (B, S, H, d). cos, sin: (S, 1, r/2), or (B, S, 1, r/2) where sequences differ; 0 < r <= d, even, in x's dtype.
    interleaved: the pairs are neighbours, elements (2i, 2i + 1) (DeepSeek); else (i, i + r/2) (Llama). Either way all
        first elements come out before all second ones: where queries and keys are permuted alike, products stay the
        same, and writes are contiguous. Elements from r on stay as they are.
    backend: one of ``OP_BACKENDS``. torch's operators round each product in x's dtype; "triton", and what is compiled
        for the CPU, only the result.

    Differentiable once in x: the pairs of the gradient are turned back.

    Raises:
        ValueError: the tables do not fit x; the backend is unknown or cannot run here.
    """
    shapes = ((x.shape[1], 1), (*x.shape[:2], 1)) if x.dim() == 4 else ()
    if cos.shape != sin.shape or tuple(cos.shape[:-1]) not in shapes or not 0 < 2 * cos.shape[-1] <= x.shape[-1]:
        found = f"{tuple(x.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(f"x is (B, S, H, d), cos and sin (S, 1, r/2) or (B, S, 1, r/2) with 0 < r <= d, not {found}")
    if cos.dtype != x.dtype or sin.dtype != x.dtype:
        raise ValueError(f"cos is {cos.dtype} and sin {sin.dtype}, but x is {x.dtype}; rope needs one dtype")
    return _Rope.apply(x, cos, sin, interleaved, takes_triton("rope", backend, x, cos, sin))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, triton: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.triton = interleaved, triton
        if triton:
            from moe_kernels.gpu.rotary import turn  # needs triton

            return turn(x.contiguous(), cos.contiguous(), sin.contiguous(), interleaved, False)
        if rows.takes_native(x):
            return rows.turn(x, cos, sin, interleaved, False)
        r = 2 * cos.shape[-1]
        a, b = (x[..., 0:r:2], x[..., 1:r:2]) if interleaved else x[..., :r].chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, *_rest(x, r)), dim=-1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (cos, sin), (g,) = ctx.saved_tensors, grads
        if ctx.triton:
            from moe_kernels.gpu.rotary import turn

            dx = turn(g.contiguous(), cos.contiguous(), sin.contiguous(), ctx.interleaved, True)
            return dx, None, None, None, None
        if rows.takes_native(g):
            return rows.turn(g, cos, sin, ctx.interleaved, True), None, None, None, None
        r = 2 * cos.shape[-1]
        u, v = g[..., :r].chunk(2, dim=-1)
        da, db = u * cos + v * sin, v * cos - u * sin
        pairs = (torch.stack((da, db), dim=-1).flatten(-2),) if ctx.interleaved else (da, db)
        return torch.cat((*pairs, *_rest(g, r)), dim=-1), None, None, None, None


def _rest(x: Tensor, r: int) -> tuple[Tensor, ...]:
    return (x[..., r:],) if r < x.shape[-1] else ()
