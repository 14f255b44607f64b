"""The experts on CPU through the compiled products: one autograd function, as in ``moe_kernels.cpu``.

Backward keeps the layer's input, the pre-activation and the routing (SonicMoE, arXiv 2512.14080, section 4). No
gathered copy of all rows is written: each thread gathers up to 512 at a time into its scratch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.late import now_or_later, room_for
from moe_kernels.native.library import call
from moe_kernels.operands import Operands

ORDER = ("swiglu", "geglu", "reglu", "gpt_oss", "swiglu_clamped", "gelu", "relu2")  # as in products.cpp
COLUMNS = 64  # of a tile, likewise


class _Experts(torch.autograd.Function):
    """Of all ``Operands``, in order, contiguous; counts come as a tensor."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x_ND, counts_e, w13, w2, index_R, weight_R, b13, b2, activation, row_TK = operands
        e, matrices, width, D = w13.shape
        R = len(x_ND if index_R is None else index_R)
        s_R = None if weight_R is None else weight_R.float()
        h_RnF, a_RF = x_ND.new_empty(R, matrices * width), x_ND.new_empty(R, width)
        call(
            "moe_up_projection", *_halves(x_ND, w13), x_ND, index_R, w13, b13, s_R, h_RnF, a_RF, counts_e, e, matrices,
            width, D, ORDER.index(activation), torch.get_num_threads(),
        )  # fmt: skip
        y_RD = rows_times_weights(a_RF, None, w2, counts_e, True, b2, s_R)
        ctx.save_for_backward(x_ND, w13, w2, weight_R, b13, b2, index_R, row_TK, h_RnF)
        ctx.counts_e, ctx.activation = counts_e, activation
        return y_RD if row_TK is None else F.embedding_bag(row_TK, y_RD, mode="sum")

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w13, w2, weight_R, b13, b2, index_R, row_TK, h_RnF = ctx.saved_tensors
        counts_e = ctx.counts_e
        need_x, need_w13, need_w2, need_weight, need_b13, need_b2 = Operands.needed(ctx)
        dy, dy_index = grads[0].contiguous(), None if row_TK is None else index_R
        e, _, width, D = w13.shape
        R = len(h_RnF)
        s_R = None if weight_R is None else weight_R.float()
        # What outlives this call comes first: what is freed at its end then leaves one gap in memory, not several.
        room13 = room_for(w13) if need_w13 else None
        room2 = room_for(w2) if need_w2 else None
        a_RF, dh_RnF = x_ND.new_empty(R, width), torch.empty_like(h_RnF)
        ds_parts = x_ND.new_empty(-(-width // COLUMNS), R, dtype=torch.float32)
        call(
            "moe_down_gradient", *_halves(x_ND, w2), dy, dy_index, w2, s_R, h_RnF, a_RF, dh_RnF, ds_parts, counts_e, e,
            width, D, R, ORDER.index(ctx.activation), torch.get_num_threads(),
        )  # fmt: skip
        dx_ND = dw13 = dw2 = ds_R = db13 = db2 = None
        if need_x:
            dx_RD = rows_times_weights(dh_RnF, None, w13.flatten(1, 2), counts_e, False)
            dx_ND = _sum_per_token(dx_RD, len(x_ND), index_R, row_TK)
        if room13 is not None:
            dw13 = now_or_later(ctx, 2, lambda: weight_gradient(dh_RnF, None, x_ND, index_R, counts_e, room13()))
        if room2 is not None:
            dw2 = now_or_later(ctx, 3, lambda: weight_gradient(dy, dy_index, a_RF, None, counts_e, room2()))
        counts = counts_e.tolist()
        dys = dy if dy_index is None or b2 is None else dy.index_select(0, dy_index)
        if need_weight and weight_R is not None:
            ds_R = ds_parts.sum(0)
            if b2 is not None:
                # No torch.mv: MKL's gives other bits to another number of threads.
                ds_R += torch.cat([(part * b.float()).sum(1) for part, b in zip(dys.split(counts), b2, strict=True)])
            ds_R = ds_R.to(weight_R.dtype)
        if need_b13 and b13 is not None:
            db13 = torch.stack([part.sum(0) for part in dh_RnF.split(counts)]).view_as(b13)
        if need_b2 and b2 is not None:
            scaled = dys.float() if s_R is None else dys * s_R[:, None]
            db2 = torch.stack([part.sum(0) for part in scaled.split(counts)]).to(b2.dtype)
        return Operands.gradients(dx_ND, dw13, dw2, ds_R, db13, db2)


def rows_times_weights(
    rows: Tensor,
    index_R: Tensor | None,
    w: Tensor,
    counts_e: Tensor,
    transposed: bool,
    bias: Tensor | None = None,
    s_R: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(R, n), ``out`` if given: each row through its expert's matrix of ``w``, (e, n, k) if transposed, else (e, k, n);
    + s * bias."""
    n, k = w.shape[1:] if transposed else (w.shape[2], w.shape[1])
    out = rows.new_empty(len(rows if index_R is None else index_R), n) if out is None else out
    call(
        "moe_rows_times_weights", *_halves(rows, w), rows, index_R, w, bias, s_R, out, counts_e, len(w), n, k,
        int(transposed), torch.get_num_threads(),
    )  # fmt: skip
    return out


def weight_gradient(
    left: Tensor,
    left_index: Tensor | None,
    right: Tensor,
    right_index: Tensor | None,
    counts_e: Tensor,
    out: Tensor,
    add: bool = False,
) -> Tensor:
    """Fills and returns ``out`` (e, ..., N), M N numbers for each expert: the sums over its rows of left^T right.
    add: to what is there, which is float32."""
    call(
        "moe_weight_gradient", *_halves(left, out), left, left_index, right, right_index, out, int(add), counts_e,
        len(out), left.shape[1], right.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _halves(rows: Tensor, weights: Tensor) -> tuple[int, int]:
    return int(rows.dtype == torch.bfloat16), int(weights.dtype == torch.bfloat16)


def _sum_per_token(dx_RD: Tensor, N: int, index_R: Tensor | None, row_TK: Tensor | None) -> Tensor:
    """The sum of the rows of each token, by gathers, in a fixed order."""
    if index_R is None:
        return dx_RD
    if row_TK is not None:
        return F.embedding_bag(row_TK, dx_RD, mode="sum")
    order_R = index_R.argsort(stable=True)
    start_N = torch.searchsorted(index_R[order_R], torch.arange(N))
    return F.embedding_bag(order_R, dx_RD, start_N, mode="sum")


def native_expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` in compiled products, for float32 and bfloat16. y_RD (R, D), or with row_TK out_TD.

    Raises:
        IndexError: index_R names a row that x does not have.
    """
    index_R = o.index_R
    real = index_R is not None and len(index_R) > 0 and not index_R.is_meta
    if index_R is not None and real and not 0 <= index_R.min() <= index_R.max() < len(o.x_ND):
        raise IndexError(f"index_R goes from {index_R.min()} to {index_R.max()}, but x has {len(o.x_ND)} rows")
    b13, b2 = (None if b is None else b.to(o.x_ND.dtype) for b in (o.b13, o.b2))
    o = o._replace(counts=torch.tensor(o.row_counts, dtype=torch.int64), b13=b13, b2=b2)
    return _Experts.apply(*(t.contiguous() if isinstance(t, Tensor) else t for t in o))
