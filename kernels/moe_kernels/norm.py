"""RMSNorm (arXiv 1910.07467) that keeps its input and one number per row for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.choice import takes_triton
from moe_kernels.native import rows

# Rows whose share of the weight's gradient torch adds up one after the other; these sums are then added up.
ROWS = 4096


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, backend: str = "auto") -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset), over the last dimension. Shape and dtype of x.

    x: (..., D). weight: (D,), any float dtype. offset: 1 in Gemma (arXiv 2403.08295). backend: one of ``OP_BACKENDS``.
    Half-precision inputs are computed in float32 from beginning to end, and rounded once.

    Differentiable once in x and weight, whose gradient is a sum in two stages, in a fixed order.

    Raises:
        ValueError: x has no floats or no width; the weight does not fit it; the backend is unknown or cannot run here.
    """
    if not x.is_floating_point() or x.shape[-1:] in ((), (0,)):
        raise ValueError(f"x has floats, (..., D) with D > 0, not {x.dtype} {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)} where x {tuple(x.shape)} needs {tuple(x.shape[-1:])}")
    triton = takes_triton("rms_norm", backend, x, weight)
    if triton or x.device.type in ("cpu", "meta"):  # on meta: what is kept, for a dry run
        return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, offset, triton).view(x.shape)
    wide = x.dtype if weight.dtype == x.dtype and offset == 0 else torch.promote_types(x.dtype, torch.float32)
    w_D = weight.to(wide) if offset == 0 else weight.to(wide) + offset
    return F.rms_norm(x.to(wide), w_D.shape, w_D, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, offset: float, triton: bool) -> Tensor:
        if triton:
            from moe_kernels.gpu.norm import rms_norm_forward  # needs triton

            x_ND, weight_D = x_ND.contiguous(), weight_D.contiguous()
            y_ND, rstd_N = rms_norm_forward(x_ND, weight_D, eps, offset)
        else:
            y_ND, rstd_N = _forward(x_ND, weight_D, eps, offset)
        ctx.save_for_backward(x_ND, weight_D, rstd_N)
        ctx.offset, ctx.triton = offset, triton
        return y_ND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        if ctx.triton:
            from moe_kernels.gpu.norm import rms_norm_backward

            return *rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.offset), None, None, None
        x_ND, weight_D, rstd_N = ctx.saved_tensors
        dx_ND, dw_D = _backward(grads[0], x_ND, weight_D, rstd_N, ctx.offset, ctx.needs_input_grad[1])
        return dx_ND, dw_D, None, None, None


def _forward(x_ND: Tensor, weight_D: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    if rows.takes_native(x_ND):
        return rows.norm_forward(x_ND, _scale(weight_D, offset, wide), eps)
    x = x_ND.to(wide)
    rstd_N1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()
    y = (x * rstd_N1).mul_(_scale(weight_D, offset, wide))
    return y.to(x_ND.dtype), rstd_N1.squeeze(1)


def _backward(
    g_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """With x^ = x rstd and v = g w: dw = sum of g x^ over rows, dx = rstd (v - x^ mean(v x^)).

    torch has a fused backward of LayerNorm. With a mean of 0 its dw is the same, and its dx less by rstd mean(v).
    """
    D, wide = x_ND.shape[1], rstd_N.dtype
    w_D = _scale(weight_D, offset, wide)
    if rows.takes_native(x_ND):
        dx_ND, sum_D = rows.norm_backward(g_ND, x_ND, w_D, rstd_N, need_weight)
        return dx_ND, None if sum_D is None else sum_D.to(weight_D.dtype)
    dw_D, parts = torch.zeros_like(w_D), [x_ND[:0]]
    for first in range(0, len(x_ND), ROWS):
        some = slice(first, first + ROWS)
        x, g, rstd_n1 = x_ND[some].to(wide), g_ND[some].to(wide), rstd_N[some].unsqueeze(1)
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            g, x, [D], torch.zeros_like(rstd_n1), rstd_n1, w_D, None, [True, need_weight, False]
        )
        dx.add_(torch.mv(g, w_D).unsqueeze(1).mul_(rstd_n1), alpha=1 / D)
        parts.append(dx.to(x_ND.dtype))
        if need_weight:
            dw_D += dw
    dx_ND = parts[1] if len(parts) == 2 else torch.cat(parts)
    return dx_ND, dw_D.to(weight_D.dtype) if need_weight else None


def _scale(weight_D: Tensor, offset: float, wide: torch.dtype) -> Tensor:
    weight_D = weight_D.to(wide)
    return weight_D.contiguous() if offset == 0 else weight_D + offset
