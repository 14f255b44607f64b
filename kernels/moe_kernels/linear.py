"""A dense layer: torch's, or on CPU the compiled products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.late import may_be_late, now_or_later
from moe_kernels.native import dense
from moe_kernels.native.library import widens_halves


def linear(x: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y = x W^T + b, as ``torch.nn.functional.linear``: x (..., K), w_NK (N, K), bias_N (N,) or None; (..., N).

    Large products in float32 on CPU go through the compiled kernels, once differentiable; all others, and those that
    torch.compile sees or torch.autocast casts, through torch, which also says what does not fit. (In bfloat16 torch's
    are as fast, where the processor has fast products of it; where it has not, the compiled kernels take these too.)
    """
    fits = w_NK.dim() == 2 and x.shape[-1:] == w_NK.shape[1:]
    fits = fits and (
        bias_N is None or (bias_N.dtype == x.dtype and bias_N.device == x.device and bias_N.shape == w_NK.shape[:1])
    )
    native = fits and dense.takes_native(x, w_NK, x.numel() // max(w_NK.shape[1], 1))
    native = native and not torch.is_autocast_enabled("cpu") and (x.dtype == torch.float32 or widens_halves())
    if not native and not (fits and may_be_late() and not torch.is_autocast_enabled(x.device.type)):
        return F.linear(x, w_NK, bias_N)
    x_TK = x.reshape(-1, x.shape[-1]).contiguous()
    bias_N = None if bias_N is None else bias_N.contiguous()
    y_TN: Tensor = _Linear.apply(x_TK, w_NK.contiguous(), bias_N, native)
    return y_TN.view(*x.shape[:-1], len(w_NK))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None, native: bool) -> Tensor:
        ctx.save_for_backward(x_TK, w_NK)
        ctx.native = native
        return dense.times_transposed(x_TK, w_NK, bias_N) if native else F.linear(x_TK, w_NK, bias_N)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, w_NK = ctx.saved_tensors
        dy_TN, native, shape, dx_TK, dw_NK = grads[0].contiguous(), ctx.native, w_NK.shape, None, None

        def weight_gradient() -> Tensor:
            return dense.transposed_times(dy_TN, x_TK, x_TK.new_empty(shape)) if native else dy_TN.t() @ x_TK

        if ctx.needs_input_grad[1]:
            dw_NK = now_or_later(ctx, 1, weight_gradient)
        if ctx.needs_input_grad[0]:
            dx_TK = dense.times(dy_TN, w_NK) if native else dy_TN @ w_NK
        return dx_TK, dw_NK, dy_TN.sum(0) if ctx.needs_input_grad[2] else None, None
