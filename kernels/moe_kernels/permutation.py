"""From order of token to order of expert and back, by gathers, forward and backward: nothing is added up by atomics.

T tokens, K experts of each, R = T K rows. Assignment a = t K + k is token t's k-th; row r is a copy of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.choice import takes_triton

# Numbers that one block of rows has in the gradient of a weighted sum on the CPU, so that it stays in the cache.
CPU_BLOCK = 64 * 1024


def permute(x_TD: Tensor, ids_TK: Tensor, num_experts: int, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(rows_RD, counts_e, row_TK): each token's vector once for each of its experts, grouped by ascending expert, in
    order of token within one; the rows of each expert; and the row of each assignment.

    x_TD: (T, D). ids_TK: int64 (T, K), from 0 to num_experts - 1; not checked on a GPU, to save a wait.
    backend: one of ``OP_BACKENDS``. Differentiable once in x: the sum of a token's rows, in order of k. Deterministic.

    Raises:
        ValueError: ids do not fit; the backend is unknown or cannot run here.
    """
    if x_TD.dim() != 2 or ids_TK.dim() != 2 or ids_TK.shape[1] == 0 or len(ids_TK) != len(x_TD):
        raise ValueError(f"x is (T, D) and ids (T, K), K > 0, not {tuple(x_TD.shape)} and {tuple(ids_TK.shape)}")
    check_ids(ids_TK, num_experts)
    triton = takes_triton("permute", backend, x_TD, ids_TK)
    counts_e, row_TK, assignment_R = order_by_expert(ids_TK, num_experts)
    return _Permute.apply(x_TD, row_TK, assignment_R, triton), counts_e, row_TK


def unpermute(y_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """out_TD: the sum of the rows that ``row_TK`` names of each token, each times its weight, or as it is.

    y_RD: (R, D). row_TK: int64 (T, K), every row once, as ``permute`` gives it. weights_TK: float (T, K), any dtype.
    backend: one of ``OP_BACKENDS``. Differentiable once in y and weights. Deterministic.

    Raises:
        ValueError: shapes do not fit; the backend is unknown or cannot run here.
    """
    weights_shape = row_TK.shape if weights_TK is None else weights_TK.shape
    if y_RD.dim() != 2 or row_TK.dim() != 2 or row_TK.numel() != len(y_RD) or weights_shape != row_TK.shape:
        shapes = f"{tuple(y_RD.shape)}, {tuple(row_TK.shape)} and {tuple(weights_shape)}"
        raise ValueError(f"y is (T K, D), rows and weights (T, K), not {shapes}")
    triton = takes_triton("unpermute", backend, y_RD, row_TK, weights_TK)
    return _Unpermute.apply(y_RD, row_TK, weights_TK, triton)


@torch.no_grad()
def sum_rows(
    y_RD: Tensor, row_A: Tensor, start: Tensor, weight_A: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """out_TD, of y's dtype: the sum of y[row_A[a]], times weight_A[a] if given, over a from start[t] to start[t + 1].

    ``unpermute`` for tokens with any number of rows each, none too. y_RD: (R, D). row_A: int64 (A,). start: int64
    (T + 1,), ascending from 0 to A. backend: one of ``OP_BACKENDS``. Without gradients: others are made of it.

    Raises:
        ValueError: shapes do not fit; the backend is unknown or cannot run here.
    """
    shapes_fit = y_RD.dim() == 2 and row_A.dim() == 1 and start.dim() == 1 and len(start) > 0
    if not shapes_fit or (weight_A is not None and weight_A.shape != row_A.shape):
        shapes = f"{tuple(y_RD.shape)}, {tuple(row_A.shape)} and {tuple(start.shape)}"
        raise ValueError(f"y is (R, D), row and weight (A,), start (T + 1,), not {shapes}")
    triton = takes_triton("sum_rows", backend, y_RD, row_A, start, weight_A)
    return _sum_rows(y_RD, row_A, weight_A, triton, start)


def check_ids(ids_TK: Tensor, num_experts: int) -> None:
    """Raise a ValueError for ids of another dtype, or on the CPU of experts that do not exist."""
    if ids_TK.dtype != torch.int64:
        raise ValueError(f"ids are int64, not {ids_TK.dtype}")
    checked = ids_TK.device.type == "cpu" and ids_TK.numel() and not torch.compiler.is_compiling()
    if checked and not 0 <= ids_TK.min() <= ids_TK.max() < num_experts:
        raise ValueError(f"ids go from {ids_TK.min()} to {ids_TK.max()}, but the experts are 0 to {num_experts - 1}")


def order_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(counts_e, row_TK, assignment_R): the rows of each expert, the row of each assignment, and its inverse."""
    id_R, assignment_R = ids_TK.flatten().sort(stable=True)
    steps = torch.arange(num_experts, device=id_R.device)
    counts_e = torch.searchsorted(id_R, steps, right=True).diff(prepend=steps.new_zeros(1))
    return counts_e, _inverse(assignment_R).view_as(ids_TK), assignment_R


def _inverse(permutation_R: Tensor) -> Tensor:
    steps = torch.arange(len(permutation_R), device=permutation_R.device)
    return torch.empty_like(permutation_R).scatter_(0, permutation_R, steps)


def _sum_rows(y_RD: Tensor, row: Tensor, weights: Tensor | None, triton: bool, start: Tensor | None = None) -> Tensor:
    """Of tokens that have K rows each, row (T, K), or of those that ``start`` tells, row (A,)."""
    if triton:
        from moe_kernels.gpu import permute as gpu  # needs triton

        weights = None if weights is None else weights.contiguous()
        return gpu.sum_rows(y_RD.contiguous(), row.contiguous(), None if start is None else start.contiguous(), weights)
    weights = None if weights is None else weights.to(y_RD.dtype)
    return F.embedding_bag(
        row, y_RD.contiguous(), start, mode="sum", per_sample_weights=weights, include_last_offset=start is not None
    )


def _copy_rows(x_TD: Tensor, assignment_R: Tensor, K: int, triton: bool) -> Tensor:
    if triton:
        from moe_kernels.gpu.permute import copy_rows

        return copy_rows(x_TD.contiguous(), assignment_R, K)
    return x_TD.index_select(0, assignment_R // K)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_TK: Tensor, assignment_R: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(row_TK)
        ctx.triton = triton
        return _copy_rows(x_TD, assignment_R, row_TK.shape[1], triton)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (row_TK,) = ctx.saved_tensors
        return _sum_rows(grads[0], row_TK, None, ctx.triton), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None, triton: bool) -> Tensor:
        ctx.save_for_backward(row_TK, *(() if weights_TK is None else (y_RD, weights_TK)))
        ctx.triton = triton
        return _sum_rows(y_RD, row_TK, weights_TK, triton)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        row_TK, *weighted = ctx.saved_tensors
        assignment_R = _inverse(row_TK.flatten())
        if not weighted:
            return _copy_rows(grads[0], assignment_R, row_TK.shape[1], ctx.triton), None, None, None
        y_RD, weights_TK = weighted
        if ctx.triton:
            from moe_kernels.gpu.permute import sum_rows_backward

            inputs = (grads[0].contiguous(), y_RD.contiguous(), weights_TK.contiguous(), assignment_R)
            dy_RD, dweights_TK = sum_rows_backward(*inputs)
        else:
            dy_RD, dweights_TK = _weighted_backward(grads[0], y_RD, weights_TK, assignment_R, row_TK)
        return dy_RD, None, dweights_TK, None


def _weighted_backward(
    g_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor, row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """weight * g for a row and <y, g> for a weight; in blocks on the CPU, to read g once."""
    token_R, weight_R = assignment_R // row_TK.shape[1], weights_TK.flatten().gather(0, assignment_R)
    wide = torch.promote_types(torch.promote_types(y_RD.dtype, weights_TK.dtype), torch.float32)
    dy_RD, dweight_R = torch.empty_like(y_RD), y_RD.new_empty(len(y_RD), dtype=wide)
    R, D = y_RD.shape
    block = max(1, CPU_BLOCK // max(D, 1)) if y_RD.device.type == "cpu" else max(R, 1)
    for first in range(0, R, block):
        rows = slice(first, first + block)
        g_rD = g_TD.index_select(0, token_R[rows])
        dweight_R[rows] = torch.sum(y_RD[rows] * g_rD, dim=-1, dtype=wide)
        torch.mul(g_rD, weight_R[rows, None].to(g_rD.dtype), out=dy_RD[rows])
    return dy_RD, dweight_R[row_TK].to(weights_TK.dtype)
