"""The Triton path in FP8: ``moe_kernels.gpu.experts`` with the recipe of ``moe_kernels.fp8_experts``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.fp8 import FP8
from moe_kernels.gpu import fp8
from moe_kernels.gpu.experts import sum_per_token
from moe_kernels.gpu.fp8 import COLUMNS, ROWS, TILE
from moe_kernels.gpu.operator import operator
from moe_kernels.gpu.sums import expert_sum, gather_sum, row_product
from moe_kernels.gpu.tiles import Tiles, cdiv, next_power_of_2, place
from moe_kernels.operands import Operands

Pair = tuple[Tensor, Tensor]  # numbers and scales


def quantize_rows(x: Tensor, pow2: bool = False) -> Pair:
    """``moe_kernels.quantize_rows`` of x (R, C)."""
    R, C = x.shape
    blocks = cdiv(C, TILE)
    q, scales = x.new_empty(R, C, dtype=FP8), x.new_empty(R, blocks, dtype=torch.float32)
    fp8.quantize_rows_kernel[(cdiv(R, ROWS), blocks)](x, q, scales, R, C, pow2, ROWS, TILE)
    return q, scales


def quantize_blocks(w: Tensor, transposed: bool = False) -> Pair:
    """``moe_kernels.quantize_blocks`` of w (..., A, B); transposed: of its transposed matrices (..., B, A)."""
    *many, A, B = w.shape
    blocks = cdiv(A, TILE), cdiv(B, TILE)
    turn = -1 if transposed else 1
    q = w.new_empty(*many, *(A, B)[::turn], dtype=FP8)
    scales = w.new_empty(*many, *blocks[::turn], dtype=torch.float32)
    grid = (blocks[0] * blocks[1], w.numel() // (A * B))
    fp8.quantize_blocks_kernel[grid](w, q, scales, A, B, transposed, TILE, num_warps=8)
    return q, scales


def quantize_columns(rows: Tensor, scales: Tensor | None, index_R: Tensor | None, tiles: Tiles) -> Pair:
    """rows[index] (R, C), numbers with ``scales`` or plain ones, quantised along the rows of each tile and transposed:
    (tiles, C, TILE) and (tiles, C)."""
    C, n = rows.shape[1], len(tiles.row)
    q, out_scales = rows.new_empty(n, C, TILE, dtype=FP8), rows.new_empty(n, C, dtype=torch.float32)
    fp8.quantize_columns_kernel[(n, cdiv(C, COLUMNS))](
        rows, scales, index_R, q, out_scales, *tiles[:3], E=tiles.experts, C=C, TILE=TILE, COLUMNS=COLUMNS
    )
    return q, out_scales


def _product(
    a: Pair,
    index_R: Tensor | None,
    w: Pair,
    tiles: Tiles,
    R: int,
    dtype: torch.dtype,
    parts: int = 1,
    summed: bool = False,
    bias: Tensor | None = None,
    s_R: Tensor | None = None,
) -> Tensor:
    """``fp8.fp8_rows_times_weights`` with w (e, parts, N, K) or, of one part, (e, N, K)."""
    N, K = w[0].shape[-2:]
    sides = 1 if summed else parts
    out = a[0].new_empty(R, sides * N, dtype=dtype)
    fp8.fp8_rows_times_weights[(len(tiles.row) * sides * cdiv(N, TILE),)](
        *a, index_R, *w, bias, s_R, out, *tiles[:3],
        E=tiles.experts, N=N, K=K, PARTS=parts, SUMMED=summed, TILE=TILE, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def _weight_gradient(left: Pair, right: Pair, tiles: Tiles, w: Tensor) -> Tensor:
    out, M, N = torch.empty_like(w), left[0].shape[1], right[0].shape[1]
    grid = (cdiv(M, TILE) * cdiv(N, TILE), len(w))
    power = next_power_of_2(len(w))
    fp8.fp8_weight_gradient[grid](
        *left, *right, out, tiles.start, E_POW2=power, M=M, N=N, TILE=TILE, num_warps=8, num_stages=3
    )
    return out


@operator("fp8_experts_forward")
def _forward(
    x_ND: Tensor,
    w13: Tensor,
    w2: Tensor,
    s_R: Tensor | None,
    b13: Tensor | None,
    b2: Tensor | None,
    index_R: Tensor | None,
    row_TK: Tensor | None,
    counts_e: Tensor,
    activation: str,
) -> list[Tensor]:
    """y_RD, or with row_TK its sums out_TD; x's numbers and scales; h_RnF."""
    _, parts, F, _ = w13.shape
    R, dtype = len(x_ND if index_R is None else index_R), x_ND.dtype
    tiles = place(counts_e, R, TILE)
    x = quantize_rows(x_ND, pow2=True)
    h_RnF = _product(x, index_R, quantize_blocks(w13), tiles, R, dtype, parts, bias=b13)
    a = h_RnF.new_empty(R, F, dtype=FP8), h_RnF.new_empty(R, cdiv(F, TILE), dtype=torch.float32)
    fp8.activation_kernel[(cdiv(R, ROWS), cdiv(F, TILE))](h_RnF, s_R, *a, R, F, activation, parts == 2, ROWS, TILE)
    y_RD = _product(a, None, quantize_blocks(w2), tiles, R, dtype, bias=b2, s_R=s_R)
    return [y_RD if row_TK is None else gather_sum(y_RD, row_TK), *x, h_RnF]


@_forward.register_fake
def _(
    x_ND: Tensor, w13: Tensor, w2: Tensor, s_R: Any, b13: Any, b2: Any, index_R: Any, row_TK: Any, *rest: Any
) -> list[Tensor]:
    R, (_, parts, F, D) = len(x_ND if index_R is None else index_R), w13.shape
    q, scales = x_ND.new_empty(x_ND.shape, dtype=FP8), x_ND.new_empty(len(x_ND), -(-D // TILE), dtype=torch.float32)
    return [x_ND.new_empty(R if row_TK is None else len(row_TK), D), q, scales, x_ND.new_empty(R, parts * F)]


@operator("fp8_experts_backward")
def _backward(
    dy: Tensor,
    w13: Tensor,
    w2: Tensor,
    s_R: Tensor | None,
    b13: Tensor | None,
    b2: Tensor | None,
    index_R: Tensor | None,
    row_TK: Tensor | None,
    counts_e: Tensor,
    x_q: Tensor,
    x_scales: Tensor,
    h_RnF: Tensor,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients in x, w13, w2, s, b13 and b2; empty where not needed. dy: that of out_TD with row_TK, else y_RD."""
    need_x, need_w13, need_w2, need_s, need_b13, need_b2 = needs
    _, parts, F, _ = w13.shape
    R, dtype, blocks = len(h_RnF), h_RnF.dtype, cdiv(F, TILE)
    tiles = place(counts_e, R, TILE)
    dy_index = None if row_TK is None else index_R
    grads = [dy.new_empty(0) for _ in needs]

    dy8 = quantize_rows(dy, pow2=True)
    da_RF = _product(dy8, dy_index, quantize_blocks(w2, transposed=True), tiles, R, dtype)
    a_RF, dh_RnF = torch.empty_like(da_RF), torch.empty_like(h_RnF)
    dh8 = h_RnF.new_empty(h_RnF.shape, dtype=FP8), h_RnF.new_empty(R, parts * blocks, dtype=torch.float32)
    ds_parts = h_RnF.new_empty(blocks + (b2 is not None), R, dtype=torch.float32)
    fp8.activation_gradient_kernel[(cdiv(R, ROWS), blocks)](
        h_RnF, da_RF, s_R, a_RF, dh_RnF, *dh8, ds_parts, R, F, activation, parts == 2, ROWS, TILE,
        num_warps=fp8.GRADIENT_WARPS,
    )  # fmt: skip
    if need_x:
        w13_t = quantize_blocks(w13, transposed=True)
        dx_RD = _product(dh8, None, w13_t, tiles, R, dtype, parts, summed=True)
        grads[0] = sum_per_token(dx_RD, len(x_q), index_R, row_TK)
    if need_w13:
        dh = quantize_columns(dh_RnF, None, None, tiles)
        grads[1] = _weight_gradient(dh, quantize_columns(x_q, x_scales, index_R, tiles), tiles, w13)
    if need_w2:
        dy_columns = quantize_columns(*dy8, dy_index, tiles)
        grads[2] = _weight_gradient(dy_columns, quantize_columns(a_RF, None, None, tiles), tiles, w2)
    if need_s and s_R is not None:
        if b2 is not None:
            row_product(dy, dy_index, b2, tiles, ds_parts[-1], TILE)
        grads[3] = ds_parts.sum(0).to(s_R.dtype)
    if need_b13 and b13 is not None:
        grads[4] = expert_sum(dh_RnF, None, None, tiles, b13.dtype).view_as(b13)
    if need_b2 and b2 is not None:
        grads[5] = expert_sum(dy, dy_index, s_R, tiles, b2.dtype)
    return grads


@_backward.register_fake
def _(dy: Tensor, *inputs: Any) -> list[Tensor]:
    needs, x_q = inputs[-1], inputs[8]
    like = (dy.new_empty(x_q.shape), *inputs[:5])
    return [torch.empty_like(t) if need else dy.new_empty(0) for t, need in zip(like, needs, strict=True)]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Inputs as ``_forward``."""
        out, *kept = _forward(*inputs)
        ctx.save_for_backward(*inputs[1:-1], *kept)
        ctx.activation = inputs[-1]
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:6])
        found = _backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.activation, needs)
        return *(grad if need else None for grad, need in zip(found, needs, strict=True)), None, None, None, None


def triton_fp8_expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` in FP8 in Triton. y_RD (R, D), or with row_TK out_TD."""
    counts_e = torch.as_tensor(o.counts, device=o.x_ND.device)
    rest = (None if t is None else t.contiguous() for t in (o.weight_R, o.b13, o.b2, o.index_R, o.row_TK))
    return _Experts.apply(o.x_ND.contiguous(), o.w13.contiguous(), o.w2.contiguous(), *rest, counts_e, o.activation)
