"""RMSNorm and rotary positions on CPU in compiled loops, where torch makes a pass over memory of each step."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.native.library import call, native_obstacle

# Rows whose share of the weight's gradient is added up one after the other.
STAGE = 256


def takes_native(x: Tensor) -> bool:
    """Whether these loops take ``x``: float32 or bfloat16 on CPU, where they are compiled."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and native_obstacle(x.dtype) is None
    )


def norm_forward(x_ND: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y_ND, rstd_N), rstd float32. scale_D: float32, what the weight and its offset make."""
    x_ND = x_ND.contiguous()
    y_ND, rstd_N = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND), dtype=torch.float32)
    N, D = x_ND.shape
    call("rows_norm_forward", _half(x_ND), x_ND, scale_D, y_ND, rstd_N, N, D, float(eps), torch.get_num_threads())
    return y_ND, rstd_N


def norm_backward(
    g_ND: Tensor, x_ND: Tensor, scale_D: Tensor, rstd_N: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx_ND, the weight's gradient in float32 or None)."""
    x_ND, g_ND = x_ND.contiguous(), g_ND.contiguous()
    N, D = x_ND.shape
    dx_ND = torch.empty_like(x_ND)
    parts_PD = x_ND.new_empty(-(-N // STAGE), D, dtype=torch.float32) if need_weight else None
    call(
        "rows_norm_backward", _half(x_ND), g_ND, x_ND, scale_D, rstd_N, dx_ND, parts_PD, N, D, STAGE,
        torch.get_num_threads(),
    )  # fmt: skip
    return dx_ND, None if parts_PD is None else parts_PD.sum(0)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    """``moe_kernels.rope``, or ``back`` its gradient."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    B, S, H, d = x.shape
    out, half = torch.empty_like(x), cos.shape[-1]
    call(
        "rows_turn", _half(x), x, cos, sin, out, B * S, max(cos.numel() // half, 1), H, d, half, int(interleaved),
        int(back), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)
