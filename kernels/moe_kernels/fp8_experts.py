"""The expert layer in FP8, emulated on the CPU number by number: what ``moe_kernels.gpu.fp8_experts`` computes.

All three products take E4M3 operands (``moe_kernels.fp8``): the forward one, the gradient of the input and that of the
weights. The summed dimension is cut into tiles of 128. A tile's sum is exact here, and rounded once to float32; it is
multiplied by both scales, and added to the others in float32, in order (arXiv 2412.19437, section 3.3.2). Between
products everything is in x's dtype.

In a weight's gradient the summed dimension is the rows of an expert: both sides are quantised along these, 128 rows at
a time from the expert's first. x and the output's gradient are quantised for the second time there, from the numbers
that the other products take; so the scales of these are powers of two (section 3.3.3).

Backward keeps x as these numbers: of a half-precision layer D + 4 ceil(D / 128) bytes per token instead of 2 D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.activation import activation_backward, activation_forward
from moe_kernels.cpu import sum_rows
from moe_kernels.fp8 import TILE, dequantize, quantize_blocks, quantize_rows
from moe_kernels.operands import Operands


class _Matrix(NamedTuple):
    """A matrix (M, K) to be multiplied along K: E4M3 numbers, and a scale for each row and tile of K."""

    q: Tensor
    scales: Tensor

    def rows(self, which: Tensor | slice) -> _Matrix:
        return _Matrix(self.q[which], self.scales[which])

    def columns(self) -> _Matrix:
        """Its transpose, quantised again along what were the rows."""
        return _Matrix(*quantize_rows(dequantize(*self).t()))


def _weights(w_AB: Tensor) -> tuple[_Matrix, _Matrix]:
    """A matrix of weights, to be multiplied along B, and its transpose, along A."""
    q, scales = quantize_blocks(w_AB)
    A, B = q.shape
    return (
        _Matrix(q, scales.repeat_interleave(TILE, 0)[:A]),
        _Matrix(q.t(), scales.t().repeat_interleave(TILE, 0)[:B]),
    )


def _add_product(out_MN: Tensor, a: _Matrix, b: _Matrix) -> Tensor:
    """out_MN + a b^T, in place. A product of two E4M3 numbers is a multiple of 2^-18 below 2^18: float64 adds 128 of
    them without rounding."""
    for i in range(a.scales.shape[1]):
        k = slice(i * TILE, (i + 1) * TILE)
        exact = a.q[:, k].double() @ b.q[:, k].double().t()
        out_MN += exact.float() * (a.scales[:, i, None] * b.scales[None, :, i])
    return out_MN


def _experts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of those that have any."""
    start = 0
    for expert, n in enumerate(counts):
        if n:
            yield expert, slice(start, start + n)
        start += n


class _ExpertMLP(torch.autograd.Function):
    """Of all ``Operands``, in order; counts come as a list."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation, row_TK = operands
        (_, n, inner, D), R = w13.shape, sum(counts)
        x = _Matrix(*quantize_rows(x_ND, pow2=True))
        h_RnF, y_RD = x_ND.new_empty(R, n * inner), x_ND.new_empty(R, D)
        for e, rows in _experts(counts):
            x_rD, s_r1 = x.rows(rows if index_R is None else index_R[rows]), _column(weight_R, rows)
            for part, w_FD in enumerate(w13[e]):
                h_rF = _add_product(w_FD.new_zeros(len(x_rD.q), inner, dtype=torch.float32), x_rD, _weights(w_FD)[0])
                if b13 is not None:
                    h_rF += b13[e, part]
                h_RnF[rows, part * inner : (part + 1) * inner] = h_rF
            a_rF = torch.empty_like(h_rF)
            activation_forward(h_RnF[rows].float(), s_r1, activation, out=a_rF)
            a = _Matrix(*quantize_rows(a_rF.to(x_ND.dtype)))
            y_rD = _add_product(a_rF.new_zeros(len(a_rF), D), a, _weights(w2[e])[0])
            if b2 is not None:
                y_rD += b2[e].float() if s_r1 is None else b2[e].float() * s_r1
            y_RD[rows] = y_rD.to(y_RD.dtype)
        ctx.save_for_backward(*x, w13, w2, weight_R, b13, b2, index_R, row_TK, h_RnF)
        ctx.counts, ctx.activation = counts, activation
        return y_RD if row_TK is None else F.embedding_bag(row_TK, y_RD, mode="sum")

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run = _Backward(ctx, grads[0])
        for e, rows in _experts(ctx.counts):
            run.expert(e, rows)
        return Operands.gradients(*run.results())


class _Backward:
    """One backward pass: its operands, and the gradients that are needed."""

    def __init__(self, ctx: Any, dy: Tensor) -> None:
        q, scales, self.w13, self.w2, self.weight_R, self.b13, self.b2, self.index_R, self.row_TK, self.h_RnF = (
            ctx.saved_tensors
        )
        self.x, self.activation, self.dtype = _Matrix(q, scales), ctx.activation, self.h_RnF.dtype
        self.dy_wide, self.dy = dy, _Matrix(*quantize_rows(dy, pow2=True))
        need_x, need_w13, need_w2, need_weight, need_b13, need_b2 = Operands.needed(ctx)
        self.dx_RD = self.h_RnF.new_empty(len(self.h_RnF), q.shape[1]) if need_x else None
        self.dw13 = torch.zeros_like(self.w13) if need_w13 else None
        self.dw2 = torch.zeros_like(self.w2) if need_w2 else None
        self.ds_R = torch.empty_like(self.weight_R, dtype=torch.float32) if need_weight else None
        self.db13 = torch.zeros_like(self.b13) if need_b13 else None
        self.db2 = torch.zeros_like(self.b2) if need_b2 else None

    def expert(self, e: int, rows: slice) -> None:
        """The gradients of one expert's parameters and rows."""
        n, inner, D = self.w13.shape[1:]
        here = rows if self.index_R is None else self.index_R[rows]
        dy_rows = rows if self.row_TK is None else here
        dy_rD, h_rnF = self.dy.rows(dy_rows), self.h_RnF[rows].float()
        da_rF = _add_product(h_rnF.new_zeros(len(h_rnF), inner), dy_rD, _weights(self.w2[e])[1]).to(self.dtype).float()
        a_rF, dh_rnF, s_r1 = torch.empty_like(da_rF), torch.empty_like(h_rnF), _column(self.weight_R, rows)
        ds_r = None if self.ds_R is None else self.ds_R[rows]
        activation_backward(h_rnF, da_rF, s_r1, self.activation, a=a_rF, dh=dh_rnF, ds=ds_r)
        a_rF, dh_rnF = a_rF.to(self.dtype), dh_rnF.to(self.dtype)
        if self.dx_RD is not None:
            dx_rD = h_rnF.new_zeros(len(h_rnF), D)
            for dh_rF, w_FD in zip(dh_rnF.chunk(n, 1), self.w13[e], strict=True):
                _add_product(dx_rD, _Matrix(*quantize_rows(dh_rF)), _weights(w_FD)[1])
            self.dx_RD[rows] = dx_rD.to(self.dtype)
        if self.dw13 is not None:
            dh = _Matrix(*quantize_rows(dh_rnF.t()))
            dw_nFD = _add_product(h_rnF.new_zeros(n * inner, D), dh, self.x.rows(here).columns())
            self.dw13[e] = dw_nFD.view(n, inner, D).to(self.dw13.dtype)
        if self.dw2 is not None:
            a = _Matrix(*quantize_rows(a_rF.t()))
            self.dw2[e] = _add_product(h_rnF.new_zeros(D, inner), dy_rD.columns(), a).to(self.dw2.dtype)
        self._biases(e, self.dy_wide[dy_rows].float(), dh_rnF.float(), s_r1, ds_r)

    def _biases(self, e: int, dy_rD: Tensor, dh_rnF: Tensor, s_r1: Tensor | None, ds_r: Tensor | None) -> None:
        if self.db13 is not None:
            self.db13[e] = dh_rnF.sum(0).view_as(self.db13[e])
        if self.db2 is not None:
            self.db2[e] = (dy_rD if s_r1 is None else dy_rD * s_r1).sum(0)
        if self.b2 is not None and ds_r is not None:
            ds_r += torch.mv(dy_rD, self.b2[e].float())

    def results(self) -> tuple[Tensor | None, ...]:
        """Gradients in x, w13, w2, weight, b13 and b2."""
        dx_ND = None if self.dx_RD is None else sum_rows(self.dx_RD, self.index_R, self.row_TK, len(self.x.q))
        ds_R = None if self.ds_R is None else self.ds_R.to(self.weight_R.dtype)
        return dx_ND, self.dw13, self.dw2, ds_R, self.db13, self.db2


def _column(weight_R: Tensor | None, rows: slice) -> Tensor | None:
    return None if weight_R is None else weight_R[rows, None].float()


def fp8_expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` in FP8, emulated. y_RD (R, D), or with row_TK out_TD."""
    return _ExpertMLP.apply(*o._replace(counts=o.row_counts))
