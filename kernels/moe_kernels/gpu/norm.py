"""RMSNorm in Triton: whole rows in registers, float32, one pass over x forward and one over x and g backward."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.gpu.operator import operator
from moe_kernels.gpu.tiles import cdiv, next_power_of_2

# Partial sums of the weight's gradient. A fixed number, so that no result depends on the chip.
PARTS = 256
# Numbers that a program holds of a tensor at a time, and the widest row.
TILE, WIDEST = 4096, 8192


@triton.jit(do_not_specialize=["N"])
def rms_norm_forward_kernel(
    x, weight, y, rstd, N, eps, offset, D: tl.constexpr, D_POW2: tl.constexpr, ROWS: tl.constexpr
):
    d = tl.arange(0, D_POW2)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (n < N)[:, None] & (d < D)[None, :]
    at = n.to(tl.int64)[:, None] * D + d[None, :]
    tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(tile * tile, 1) / D + eps)
    scale = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) + offset
    tl.store(y + at, (tile * r[:, None] * scale[None, :]).to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + n, r, mask=n < N)


@triton.jit(do_not_specialize=["N", "EACH"])
def rms_norm_backward_kernel(
    g, x, weight, rstd, dx, parts, N, offset, EACH, D: tl.constexpr, D_POW2: tl.constexpr, ROWS: tl.constexpr
):
    """The gradient of x, and each program's share, of EACH consecutive rows, of the weight's."""
    d = tl.arange(0, D_POW2)
    scale = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) + offset
    sums = tl.zeros((ROWS, D_POW2), tl.float32)
    first = tl.program_id(0) * EACH
    end = tl.minimum(first + EACH, N)
    for row in range(first, end, ROWS):
        n = row + tl.arange(0, ROWS)
        mask = (n < end)[:, None] & (d < D)[None, :]
        at = n.to(tl.int64)[:, None] * D + d[None, :]
        r = tl.load(rstd + n, mask=n < end, other=0.0)[:, None]
        hat = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * r
        above = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
        sums += above * hat
        v = above * scale[None, :]
        out = r * (v - hat * (tl.sum(v * hat, 1) / D)[:, None])
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
    tl.store(parts + tl.program_id(0) * D + d, tl.sum(sums, 0), mask=d < D)


def launch(D: int) -> dict[str, int]:
    """The constants of both kernels for rows of width D, and their warps."""
    wide = next_power_of_2(D)
    if wide > WIDEST:
        raise ValueError(f"rms_norm on backend 'triton' takes rows up to {WIDEST} wide, not {D}; use 'auto' or 'torch'")
    rows = max(1, TILE // wide)
    return {"D": D, "D_POW2": wide, "ROWS": rows, "num_warps": max(4, rows * wide // 512)}


@operator("rms_norm_forward")
def rms_norm_forward(x_ND: Tensor, weight_D: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(y_ND, rstd_N)."""
    N, D = x_ND.shape
    y_ND, rstd_N = torch.empty_like(x_ND), x_ND.new_empty(N, dtype=torch.float32)
    constants = launch(D)
    if N:
        rms_norm_forward_kernel[(cdiv(N, constants["ROWS"]),)](
            x_ND, weight_D, y_ND, rstd_N, N, eps, offset, **constants
        )
    return y_ND, rstd_N


@rms_norm_forward.register_fake
def _(x_ND: Tensor, weight_D: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), x_ND.new_empty(len(x_ND), dtype=torch.float32)


@operator("rms_norm_backward")
def rms_norm_backward(
    g_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """The gradients in x and weight."""
    N, D = x_ND.shape
    constants = launch(D)
    rows = constants["ROWS"]
    each = rows * cdiv(max(N, 1), rows * PARTS)
    dx_ND = torch.empty_like(x_ND)
    parts_PD = x_ND.new_empty(cdiv(N, each), D, dtype=torch.float32)
    if N:
        rms_norm_backward_kernel[(len(parts_PD),)](
            g_ND, x_ND, weight_D, rstd_N, dx_ND, parts_PD, N, offset, each, **constants
        )
    return dx_ND, parts_PD.sum(0).to(weight_D.dtype)


@rms_norm_backward.register_fake
def _(g_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), torch.empty_like(weight_D)
