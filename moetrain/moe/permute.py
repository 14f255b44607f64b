"""Moving rows between token order and expert order, and adding them up again; deterministic, forward and backward.

The two operations are each other's transpose: ``gather_rows`` copies a token's vector to each of its rows, ``sum_rows``
adds a token's rows. Both run as gathers (a weighted sum over a bag of rows), never as a scatter with atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import moe_kernels
import torch
from torch import Tensor

# Elements that one block of sum_rows' backward touches on CPU, so that they stay in the cache.
CPU_BLOCK = 64 * 1024


@dataclass(frozen=True)
class RowOrder:
    """How R rows, grouped by expert, belong to T tokens. Assignments (R of them) are in ascending order of token.

    assignment_R: the assignment that row r serves; a permutation.
    row_A: the row of assignment a; the inverse permutation.
    token_R: the token that row r is a copy of.
    start: (T + 1,): the first assignment of each token, and R.
    """

    assignment_R: Tensor
    row_A: Tensor
    token_R: Tensor
    start: Tensor


def order_by_expert(token_A: Tensor, expert_A: Tensor, n_tokens: int) -> RowOrder:
    """Rows grouped by ascending expert, and in order of token within an expert. token_A must ascend."""
    assignment_R = expert_A.argsort(stable=True)
    return RowOrder(
        assignment_R=assignment_R,
        row_A=inverse(assignment_R),
        token_R=token_A.index_select(0, assignment_R),
        start=torch.searchsorted(token_A, torch.arange(n_tokens + 1, device=token_A.device)),
    )


def inverse(permutation: Tensor) -> Tensor:
    """The inverse of a permutation of 0..n-1, int64 (n,)."""
    n = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, n)


def count(ids: Tensor, n: int) -> Tensor:
    """How often each of 0..n-1 occurs in ``ids`` (int64, any shape): int64 (n,). Never waits for a GPU."""
    ids = ids.reshape(-1)
    if ids.device.type == "cpu":
        return torch.bincount(ids, minlength=n)
    return count_sorted(ids.sort().values, n)  # bincount waits for the largest id


def count_sorted(ids: Tensor, n: int) -> Tensor:
    """``count`` of ascending ids of 0..n-1."""
    return torch.searchsorted(ids, torch.arange(n + 1, device=ids.device)).diff()


def gather_rows(x_TD: Tensor, order: RowOrder) -> Tensor:
    """x_RD: row r is the vector of its token. Backward is ``sum_rows``."""
    return _GatherRows.apply(x_TD, order)


def sum_rows(y_RD: Tensor, order: RowOrder, weight_A: Tensor | None = None) -> Tensor:
    """out_TD: the sum of each token's rows, each times the weight of its assignment; zero for a token without rows.

    Sums run in order of assignment. weight_A may be wider than y_RD; the result has the type of y_RD.
    """
    return _SumRows.apply(y_RD, order, weight_A)


def permute(x_R: Tensor, permutation: Tensor, inverse_permutation: Tensor) -> Tensor:
    """x_R[permutation] along dimension 0. Backward is the inverse permutation, a gather as well."""
    return _Permute.apply(x_R, permutation, inverse_permutation)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return x_TD.index_select(0, order.token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return moe_kernels.sum_rows(grads[0], ctx.order.row_A, ctx.order.start), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order: RowOrder, weight_A: Tensor | None) -> Tensor:
        ctx.order = order
        if weight_A is not None:
            ctx.save_for_backward(y_RD, weight_A)
        return moe_kernels.sum_rows(y_RD, order.row_A, order.start, weight_A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        order: RowOrder = ctx.order
        saved = ctx.saved_tensors  # read once: under activation checkpointing a second read is an error
        if not saved:
            return grads[0].index_select(0, order.token_R), None, None
        y_RD, weight_A = saved
        return _weighted_backward(grads[0], y_RD, weight_A, order)


def _weighted_backward(g_TD: Tensor, y_RD: Tensor, weight_A: Tensor, order: RowOrder) -> tuple[Tensor, None, Tensor]:
    """Gradients of the weighted sum: weight * g for a row, y . g for a weight; block by block, to read g once."""
    weight_R = weight_A.index_select(0, order.assignment_R)
    grad_y_RD = torch.empty_like(y_RD)
    grad_weight_R = torch.empty_like(weight_R)
    R, D = y_RD.shape
    block = max(1, CPU_BLOCK // D) if y_RD.device.type == "cpu" else max(1, R)
    for i in range(0, R, block):
        rows = slice(i, i + block)
        g_RD = g_TD.index_select(0, order.token_R[rows])
        torch.sum(y_RD[rows] * g_RD, dim=-1, dtype=weight_A.dtype, out=grad_weight_R[rows])
        torch.mul(g_RD, weight_R[rows, None].to(g_RD.dtype), out=grad_y_RD[rows])
    return grad_y_RD, None, grad_weight_R.index_select(0, order.row_A)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R: Tensor, permutation: Tensor, inverse_permutation: Tensor) -> Tensor:
        ctx.inverse = inverse_permutation
        return x_R.index_select(0, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse), None, None
