"""The fast CPU path: one autograd function for the whole expert computation.

Backward follows SonicMoE (arXiv 2512.14080, section 4): only the layer input, the pre-activation and the routing are
kept; the activation is computed again, and the routing weight's gradient is <dA', A> over the expert width, so the
down-projection's output is never needed. For the same reason the routing weight multiplies the activation, not the
output. Gathered rows live for one expert at a time, in the cache.

Half-precision products run in oneDNN, which generates code for every shape that it has not seen (the last thousand are
kept). Experts' row counts differ at every step, so each product is widened to a multiple of ``TILE`` rows: on uneven
experts of 256 rows that made products 3 to 6 times faster than exact shapes. Where the surplus rows cannot matter they
are the next expert's (outputs are overwritten in turn); where they would be summed up they are zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.activation import activation_backward, activation_forward
from moe_kernels.late import is_late, now_or_later, room_for
from moe_kernels.native.experts import native_expert_mlp
from moe_kernels.native.library import native_obstacle
from moe_kernels.operands import Operands

TILE = 32


class _Block(NamedTuple):
    """Rows ``start`` to ``start + n`` belong to ``expert``; products run on ``wide`` >= n rows."""

    expert: int
    start: int
    n: int
    wide: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.n)

    @property
    def wide_rows(self) -> slice:
        return slice(self.start, self.start + self.wide)


def _blocks(counts: list[int], dtype: torch.dtype, exact: bool = False) -> list[_Block]:
    """The experts that have rows. exact: products are not widened."""
    tile = TILE if dtype in (torch.bfloat16, torch.float16) and not exact else 1
    blocks, start = [], 0
    for expert, n in enumerate(counts):
        if n:
            blocks.append(_Block(expert, start, n, -(-n // tile) * tile))
        start += n
    return blocks


def _end(blocks: list[_Block]) -> int:
    """Rows that a buffer needs so that the last product fits."""
    return max((b.start + b.wide for b in blocks), default=0)


class _Input:
    """Blocks of wide rows out of a tensor (gathered by ``index_R`` if given); the surplus rows are zeros."""

    def __init__(self, x_ND: Tensor, index_R: Tensor | None, blocks: list[_Block]) -> None:
        self.x_ND, self.index_R = x_ND, index_R
        copies = index_R is not None or any(b.wide != b.n for b in blocks)
        self.scratch = x_ND.new_empty(_widest(blocks) if copies else 0, x_ND.shape[1])

    def __getitem__(self, b: _Block) -> Tensor:
        if self.index_R is None and b.wide == b.n:
            return self.x_ND[b.rows]
        out = self.scratch[: b.wide]
        if self.index_R is None:
            out[: b.n].copy_(self.x_ND[b.rows])
        else:
            torch.index_select(self.x_ND, 0, self.index_R[b.rows], out=out[: b.n])
        if b.wide != b.n:
            out[b.n :].zero_()
        return out


class _Weights:
    """The matrices of a parameter (e, rows, columns) in ``dtype``; wider ones are rounded one at a time."""

    def __init__(self, w: Tensor, dtype: torch.dtype) -> None:
        self.matrices = w.unbind(0)
        self.scratch = None if w.dtype == dtype else w.new_empty(w.shape[1:], dtype=dtype)

    def __getitem__(self, b: _Block) -> Tensor:
        matrix = self.matrices[b.expert]
        return matrix if self.scratch is None else self.scratch.copy_(matrix)


class _WeightGrad:
    """The gradient of a parameter (e, rows, columns), in its dtype, from products in ``dtype``."""

    def __init__(self, grad: Tensor, dtype: torch.dtype, counts: list[int]) -> None:
        self.grad, self.matrices = grad, grad.unbind(0)
        self.scratch = None if grad.dtype == dtype else grad.new_empty(grad.shape[1:], dtype=dtype)
        for matrix, n in zip(self.matrices, counts, strict=True):
            if n == 0:
                matrix.zero_()

    def product(self, b: _Block, left: Tensor, right: Tensor) -> None:
        """left @ right is the gradient of the block's matrix."""
        if self.scratch is None:
            torch.mm(left, right, out=self.matrices[b.expert])
        else:
            self.matrices[b.expert].copy_(torch.mm(left, right, out=self.scratch))


def _weight_gradient(
    room: Callable[[], Tensor], left: _Input, right: _Input, blocks: list[_Block], counts: list[int]
) -> Tensor:
    """For each expert, the sum over its rows of left^T right."""
    dw = _WeightGrad(room(), left.x_ND.dtype, counts)
    for b in blocks:
        dw.product(b, left[b].t(), right[b])
    return dw.grad


class _ExpertMLP(torch.autograd.Function):
    """Of all ``Operands``, in order; w13 comes flattened to (e, nF, D), b13 to (e, nF), counts as a list."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation, row_TK = operands
        R = sum(counts)
        blocks = _blocks(counts, x_ND.dtype)
        h_RnF = x_ND.new_empty(_end(blocks), w13.shape[1])
        y_RD = x_ND.new_empty(_end(blocks), x_ND.shape[1])
        a_all = x_ND.new_empty(_widest(blocks), w2.shape[2])
        x_of = _Input(x_ND, index_R, blocks)
        s_R1 = _column(weight_R, x_ND.dtype)
        w13_of, w2_of = _Weights(w13, x_ND.dtype), _Weights(w2, x_ND.dtype)
        for b in blocks:
            h, a = h_RnF[b.wide_rows], a_all[: b.wide]
            torch.mm(x_of[b], w13_of[b].t(), out=h)
            if b13 is not None:
                h += b13[b.expert]
            activation_forward(h[: b.n], None if s_R1 is None else s_R1[b.rows], activation, out=a[: b.n])
            torch.mm(a, w2_of[b].t(), out=y_RD[b.wide_rows])
            if b2 is not None:
                y_RD[b.rows] += b2[b.expert] if s_R1 is None else s_R1[b.rows] * b2[b.expert]
        ctx.save_for_backward(x_ND, w13, w2, weight_R, b13, b2, index_R, row_TK, h_RnF[:R])
        ctx.counts, ctx.activation = counts, activation
        return y_RD[:R] if row_TK is None else F.embedding_bag(row_TK, y_RD, mode="sum")

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run = _Backward(ctx, grads[0])
        for b in run.blocks:
            run.expert(b)
        if run.late:
            run.leave_weights(ctx)
        return Operands.gradients(*run.results())


class _Backward:
    """One backward pass: its operands, scratch for the largest expert, and the gradients that are needed."""

    def __init__(self, ctx: Any, dy: Tensor) -> None:
        x_ND, w13, w2, weight_R, self.b13, self.b2, self.index_R, self.row_TK, self.h_RnF = ctx.saved_tensors
        need_x, need_w13, need_w2, need_weight, need_b13, need_b2 = Operands.needed(ctx)
        dtype, self.activation, self.tokens, self.late = x_ND.dtype, ctx.activation, len(x_ND), is_late()
        self.blocks = _blocks(ctx.counts, dtype, exact=self.late)
        self.x_of = _Input(x_ND, self.index_R, self.blocks)
        self.dy_of = _Input(dy, None if self.row_TK is None else self.index_R, self.blocks)
        self.w13_of, self.w2_of = _Weights(w13, dtype), _Weights(w2, dtype)
        self.weight_R, self.s_R1 = weight_R, _column(weight_R, dtype)
        widest = _widest(self.blocks)
        held = len(self.h_RnF) if self.late else widest
        self.a_all, self.dh_all = x_ND.new_empty(held, w2.shape[2]), x_ND.new_empty(held, w13.shape[1])
        self.da_all = x_ND.new_empty(widest, w2.shape[2])
        self.dx_RD = x_ND.new_empty(_end(self.blocks), x_ND.shape[1]) if need_x else None
        self.room13, self.room2 = room_for(w13) if need_w13 else None, room_for(w2) if need_w2 else None
        self.dw13, self.dw2 = (
            None if room is None or self.late else _WeightGrad(room(), dtype, ctx.counts)
            for room in (self.room13, self.room2)
        )
        self.db13 = torch.zeros_like(self.b13) if need_b13 else None
        self.db2 = torch.zeros_like(self.b2) if need_b2 else None
        wide = torch.promote_types(dtype, torch.float32)
        self.ds_R = torch.empty_like(weight_R, dtype=wide) if need_weight else None

    def expert(self, b: _Block) -> None:
        """The gradients of one expert's parameters and rows."""
        here = b.rows if self.late else slice(b.wide)
        dy, a, da, dh = self.dy_of[b], self.a_all[here], self.da_all[: b.wide], self.dh_all[here]
        s = None if self.s_R1 is None else self.s_R1[b.rows]
        ds = None if self.ds_R is None else self.ds_R[b.rows]
        torch.mm(dy, self.w2_of[b], out=da)
        activation_backward(self.h_RnF[b.rows], da[: b.n], s, self.activation, a=a[: b.n], dh=dh[: b.n], ds=ds)
        if b.wide != b.n:
            a[b.n :].zero_()
            dh[b.n :].zero_()
        if self.dw2 is not None:
            self.dw2.product(b, dy.t(), a)
        if self.dw13 is not None:
            self.dw13.product(b, dh.t(), self.x_of[b])
        if self.dx_RD is not None:
            torch.mm(dh, self.w13_of[b], out=self.dx_RD[b.wide_rows])
        self._biases(b, dy[: b.n], dh[: b.n], s, ds)

    def leave_weights(self, ctx: Any) -> None:
        """The gradients of w13 and w2 come later, of every row's dh and a."""
        a_of, dh_of = (_Input(t, None, self.blocks) for t in (self.a_all, self.dh_all))
        for tensor, room, left, right in ((1, self.room13, dh_of, self.x_of), (2, self.room2, self.dy_of, a_of)):
            if room is not None:
                compute = functools.partial(_weight_gradient, room, left, right, self.blocks, ctx.counts)
                now_or_later(ctx, tensor, compute)

    def _biases(self, b: _Block, dy: Tensor, dh: Tensor, s: Tensor | None, ds: Tensor | None) -> None:
        if self.db13 is not None:
            torch.sum(dh, 0, out=self.db13[b.expert])
        if self.db2 is not None:
            torch.sum(dy if s is None else dy * s, 0, out=self.db2[b.expert])
        if self.b2 is not None and ds is not None:
            ds += torch.mv(dy, self.b2[b.expert])

    def results(self) -> tuple[Tensor | None, ...]:
        """Gradients in x, w13, w2, weight, b13 and b2."""
        dx_RD = None if self.dx_RD is None else self.dx_RD[: len(self.h_RnF)]
        dx_ND = None if dx_RD is None else sum_rows(dx_RD, self.index_R, self.row_TK, self.tokens)
        dw13, dw2 = (None if dw is None else dw.grad for dw in (self.dw13, self.dw2))
        ds_R = None if self.ds_R is None else self.ds_R.to(self.weight_R.dtype)
        return dx_ND, dw13, dw2, ds_R, self.db13, self.db2


def sum_rows(rows_RD: Tensor, index_R: Tensor | None, row_TK: Tensor | None, tokens: int) -> Tensor:
    """out_ND[i]: the sum of the rows r with index_R[r] = i, by gathers, in a fixed order."""
    if index_R is None:
        return rows_RD
    if row_TK is not None:
        return F.embedding_bag(row_TK, rows_RD, mode="sum")
    order_R = index_R.argsort(stable=True)
    start_N = torch.searchsorted(index_R[order_R], torch.arange(tokens))
    return F.embedding_bag(order_R, rows_RD, start_N, mode="sum")


def _widest(blocks: list[_Block]) -> int:
    return max((b.wide for b in blocks), default=0)


def _column(weight_R: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if weight_R is None else weight_R.to(dtype)[:, None]


def cpu_expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` on CPU, compiled where that can be. y_RD (R, D), or with row_TK out_TD."""
    if native_obstacle(o.x_ND.dtype) is None:
        return native_expert_mlp(o)
    b13 = None if o.b13 is None else o.b13.flatten(1, 2).to(o.x_ND.dtype)
    b2 = None if o.b2 is None else o.b2.to(o.x_ND.dtype)
    return _ExpertMLP.apply(*o._replace(counts=o.row_counts, w13=o.w13.flatten(1, 2), b13=b13, b2=b2))
