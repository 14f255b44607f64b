"""Sums in Triton, of each token's rows, each expert's, and along a row: float32, in a fixed order, without atomics."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.gpu.tiles import TILE, Tiles, cdiv, next_power_of_2, rows_of_tile

# Rows of an expert's sum that a program reads at a time; columns of it, and of a token's sum.
ROWS, COLUMNS, TOKEN_COLUMNS = 64, 512, 1024


@triton.jit
def gather_sum_kernel(rows, order, start, weights, out, D: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr):
    """out_ND[i] = sum of rows[order[j]], times weights[j] if given, over j from start[i] to start[i + 1], or without
    start i K to (i + 1) K. One row after the other: so all warps read one row, and many programs hide the waiting."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    sums = tl.zeros((COLS,), tl.float32)
    if start is None and K <= 16:
        for k in tl.static_range(K):
            sums += _row(rows, order, weights, i * K + k, d, D)
    else:
        first = i * K if start is None else tl.load(start + i)
        for j in range(first, first + K if start is None else tl.load(start + i + 1)):
            sums += _row(rows, order, weights, j, d, D)
    tl.store(out + i * D + d, sums.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _row(rows, order, weights, j, d, D: tl.constexpr):
    """weights[j] * rows[order[j]], float32."""
    row = tl.load(rows + tl.load(order + j).to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    return row if weights is None else row * tl.load(weights + j).to(tl.float32)


@triton.jit
def expert_sum_kernel(rows, index, s, out, start, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out_eC: of each expert, the sum over its rows r of s[r] * rows[index[r]]."""
    e = tl.program_id(0)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    end = tl.load(start + e + 1)
    sums = tl.zeros((COLS,), tl.float32)
    for first in range(tl.load(start + e), end, ROWS):
        r = (first + tl.arange(0, ROWS)).to(tl.int64)
        source = r if index is None else tl.load(index + r, mask=r < end, other=0)
        mask = (r < end)[:, None] & (c < C)[None, :]
        tile = tl.load(rows + source[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if s is not None:
            tile *= tl.load(s + r, mask=r < end, other=0.0).to(tl.float32)[:, None]
        sums += tl.sum(tile, 0)
    tl.store(out + e.to(tl.int64) * C + c, sums.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def row_product_kernel(
    rows, index, vectors, out, expert, row, start,
    E: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out_R[r] = <rows[index[r]], the vector of r's expert>; zero for rows without expert."""
    e, first, step, live = rows_of_tile(expert, row, start, tl.program_id(0), TILE)
    sums = tl.zeros((TILE,), tl.float32)
    if e < E:
        source = first + step if index is None else tl.load(index + first + step)
        for d in range(0, D, COLS):
            c = d + tl.arange(0, COLS)
            tile = tl.load(rows + source[:, None] * D + c[None, :], mask=(c < D)[None, :], other=0.0).to(tl.float32)
            vector = tl.load(vectors + e * D + c, mask=c < D, other=0.0).to(tl.float32)
            sums += tl.sum(tile * vector[None, :], 1)
    tl.store(out + first + step, sums, mask=live)


def gather_sum(rows_RD: Tensor, order: Tensor, start: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """out_ND[i]: the sum of the rows ``order[i]`` (order: (N, K)), or with start (N + 1,) of those that
    ``order[start[i]:start[i + 1]]`` names; each times its entry of weights, of order's shape, if given."""
    D = rows_RD.shape[1]
    N, K = order.shape if start is None else (len(start) - 1, 0)
    out = rows_RD.new_empty(N, D)
    cols = min(TOKEN_COLUMNS, next_power_of_2(D))
    gather_sum_kernel[(N, cdiv(D, cols))](rows_RD, order, start, weights, out, D, K, cols)
    return out


def expert_sum(rows: Tensor, index_R: Tensor | None, s_R: Tensor | None, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """out_eC: of each expert, the sum over its rows r of s[r] * rows[index[r]]."""
    e, C = tiles.experts, rows.shape[1]
    out = rows.new_empty(e, C, dtype=dtype)
    cols = min(COLUMNS, next_power_of_2(C))
    expert_sum_kernel[(e, cdiv(C, cols))](rows, index_R, s_R, out, tiles.start, C, ROWS, cols)
    return out


def row_product(
    rows: Tensor, index_R: Tensor | None, vectors_eD: Tensor, tiles: Tiles, out_R: Tensor, tile: int = TILE
) -> None:
    """out_R[r] = <rows[index[r]], the vector of r's expert>; zero for rows without expert. tile: rows of ``tiles``."""
    e, D = vectors_eD.shape
    row_product_kernel[(len(tiles.row),)](rows, index_R, vectors_eD, out_R, *tiles[:3], E=e, D=D, TILE=tile, COLS=64)
