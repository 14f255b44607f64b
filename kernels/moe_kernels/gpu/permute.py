"""Rows in order of expert in Triton: copies of tokens' vectors, sums of tokens' rows, and the gradients of both."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.gpu.operator import operator
from moe_kernels.gpu.sums import gather_sum
from moe_kernels.gpu.tiles import cdiv, next_power_of_2

# Rows of a program, and columns that it reads at a time.
ROWS, COLUMNS = 4, 1024


@triton.jit(do_not_specialize=["R"])
def copy_rows_kernel(
    x, assignment, weights, y, out, dots, R,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out_RD[r] = x[a // K], a = assignment[r]; with weights that times weights[a], and dots[a] = <y[r], x[a // K]>."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < R
    a = tl.load(assignment + r, mask=live, other=0)
    source, to = (a // K)[:, None] * D, r.to(tl.int64)[:, None] * D
    if weights is not None:
        weight = tl.load(weights + a, mask=live, other=0.0).to(tl.float32)[:, None]
        sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, D, COLS):
        d = first + tl.arange(0, COLS)
        mask = live[:, None] & (d < D)[None, :]
        tile = tl.load(x + source + d[None, :], mask=mask, other=0.0)
        if weights is None:
            tl.store(out + to + d[None, :], tile, mask=mask)
        else:
            tile = tile.to(tl.float32)
            sums += tl.sum(tile * tl.load(y + to + d[None, :], mask=mask, other=0.0).to(tl.float32), 1)
            tl.store(out + to + d[None, :], (tile * weight).to(out.dtype.element_ty), mask=mask)
    if weights is not None:
        tl.store(dots + a, sums, mask=live)


def _launch(
    x_TD: Tensor, assignment_R: Tensor, K: int, weights: Tensor | None, y: Tensor | None, dots: Tensor | None
) -> Tensor:
    R, D = len(assignment_R), x_TD.shape[1]
    out_RD = x_TD.new_empty(R, D)
    columns = min(COLUMNS, next_power_of_2(max(D, 1)))
    if R:
        copy_rows_kernel[(cdiv(R, ROWS),)](
            x_TD, assignment_R, weights, y, out_RD, dots, R, D=D, K=K, ROWS=ROWS, COLS=columns
        )
    return out_RD


@operator("copy_rows")
def copy_rows(x_TD: Tensor, assignment_R: Tensor, K: int) -> Tensor:
    """out_RD: row r is ``x_TD[assignment_R[r] // K]``."""
    return _launch(x_TD, assignment_R, K, None, None, None)


@copy_rows.register_fake
def _(x_TD: Tensor, assignment_R: Tensor, K: int) -> Tensor:
    return x_TD.new_empty(len(assignment_R), x_TD.shape[1])


@operator("sum_rows")
def sum_rows(y_RD: Tensor, row: Tensor, start: Tensor | None, weights: Tensor | None) -> Tensor:
    """out_TD: ``sums.gather_sum``, the sum of each token's rows, each times its weight."""
    return gather_sum(y_RD, row, start, weights)


@sum_rows.register_fake
def _(y_RD: Tensor, row: Tensor, start: Tensor | None, weights: Tensor | None) -> Tensor:
    return y_RD.new_empty(len(row) if start is None else len(start) - 1, y_RD.shape[1])


@operator("sum_rows_backward")
def sum_rows_backward(g_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients in y and weights of ``sum_rows``."""
    dots_TK = torch.empty_like(weights_TK, dtype=torch.float32)
    dy_RD = _launch(g_TD, assignment_R, weights_TK.shape[1], weights_TK, y_RD, dots_TK)
    return dy_RD, dots_TK.to(weights_TK.dtype)


@sum_rows_backward.register_fake
def _(g_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_RD), torch.empty_like(weights_TK)
