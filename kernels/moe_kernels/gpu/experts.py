"""The Triton path: one autograd function for the experts, and if asked for the sum of each token's rows.

Backward keeps what the CPU path (``moe_kernels.cpu``) keeps: the layer's input, the pre-activation, the routing. No
gathered row is written, the counts stay on the device, and no buffer's size depends on them, so a layer can be captured
in a CUDA graph. Both passes are operators of their own to torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.gpu.operator import operator
from moe_kernels.gpu.products import down_gradient, rows_times_weights, up_projection, weight_gradient
from moe_kernels.gpu.sums import expert_sum, gather_sum, row_product
from moe_kernels.gpu.tiles import COLUMNS, TILE, Tiles, cdiv, matrix_reader, multiprocessors, place, rows_class_of
from moe_kernels.late import now_or_later
from moe_kernels.operands import Operands


@operator("experts_forward")
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
) -> tuple[Tensor, Tensor]:
    """(y_RD, or with row_TK its sums out_TD; h_RnF)."""
    e, matrices, F, D = w13.shape
    R = len(x_ND if index_R is None else index_R)
    tiles = place(counts_e, R)
    h_RnF, a_RF = x_ND.new_empty(R, matrices * F), x_ND.new_empty(R, F)
    up_projection[_grid(tiles, F)](
        x_ND, index_R, w13, b13=b13, s=s_R, h=h_RnF, a=a_RF, **tiles._asdict(),
        w_reader=matrix_reader(w13.flatten(0, 1), D),
        E=e, F=F, D=D, ACT=activation, GATED=matrices == 2, TILE=TILE, PRECISION=_precision(),
    )  # fmt: skip
    y_RD = run_rows_times_weights(a_RF, w2, tiles, D, (F, 1), b2, s_R)
    return (y_RD if row_TK is None else gather_sum(y_RD, row_TK)), h_RnF


@_forward.register_fake
def _(
    x_ND: Tensor, w13: Tensor, w2: Tensor, s_R: Any, b13: Any, b2: Any, index_R: Any, row_TK: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    R, (_, matrices, F, D) = len(x_ND if index_R is None else index_R), w13.shape
    return x_ND.new_empty(R if row_TK is None else len(row_TK), D), x_ND.new_empty(R, matrices * F)


@operator("experts_backward")
def _backward(
    dy: Tensor,
    x_ND: Tensor,
    w13: Tensor,
    w2: Tensor,
    s_R: Tensor | None,
    b13: Tensor | None,
    b2: Tensor | None,
    index_R: Tensor | None,
    row_TK: Tensor | None,
    counts_e: Tensor,
    h_RnF: Tensor,
    activation: str,
    needs: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The gradients in x, s, b13 and b2, those of parameters of ``dtype``; empty where not needed. Then what those of
    w13 and w2 are made of: a_RF, dh_RnF, and where each expert's rows start. dy: that of out_TD with row_TK, else of
    y_RD."""
    need_x, need_s, need_b13, need_b2 = needs
    e, matrices, F, D = w13.shape
    R = len(h_RnF)
    tiles = place(counts_e, R)
    dy_index = None if row_TK is None else index_R
    grads = [x_ND.new_empty(0) for _ in needs]

    a_RF, dh_RnF = x_ND.new_empty(R, F), torch.empty_like(h_RnF)
    ds_parts = x_ND.new_zeros(cdiv(F, COLUMNS) + (b2 is not None), R, dtype=torch.float32)
    down_gradient[_grid(tiles, F)](
        dy, dy_index, w2, s=s_R, h=h_RnF, a=a_RF, dh=dh_RnF, ds=ds_parts, R=R, **tiles._asdict(),
        w_reader=matrix_reader(w2.flatten(0, 1), D),
        E=e, F=F, D=D, ACT=activation, GATED=matrices == 2, TILE=TILE, PRECISION=_precision(),
    )  # fmt: skip
    if need_x:
        dx_RD = run_rows_times_weights(dh_RnF, w13, tiles, D, (1, D))
        grads[0] = sum_per_token(dx_RD, len(x_ND), index_R, row_TK)
    if need_s and s_R is not None:
        if b2 is not None:
            row_product(dy, dy_index, b2, tiles, ds_parts[-1])
        grads[1] = ds_parts.sum(0).to(s_R.dtype)
    if need_b13 and b13 is not None:
        grads[2] = expert_sum(dh_RnF, None, None, tiles, dtype).view_as(b13)
    if need_b2 and b2 is not None:
        grads[3] = expert_sum(dy, dy_index, s_R, tiles, dtype)
    return [*grads, a_RF, dh_RnF, tiles.start]


@_backward.register_fake
def _(dy: Tensor, x_ND: Tensor, w13: Tensor, w2: Tensor, s_R: Any, b13: Any, b2: Any, *rest: Any) -> list[Tensor]:
    *_, counts_e, h_RnF, _, needs, dtype = rest
    inputs, dtypes = (x_ND, s_R, b13, b2), (x_ND.dtype, None if s_R is None else s_R.dtype, dtype, dtype)
    grads = [
        torch.empty_like(t, dtype=wide) if need else dy.new_empty(0)
        for t, wide, need in zip(inputs, dtypes, needs, strict=True)
    ]
    start = counts_e.new_empty(len(counts_e) + 4, dtype=torch.int32)
    return [*grads, x_ND.new_empty(len(h_RnF), w2.shape[2]), torch.empty_like(h_RnF), start]


@operator("experts_weight_gradient")
def _weight_gradient(
    left: Tensor,
    left_index: Tensor | None,
    right: Tensor,
    right_index: Tensor | None,
    start: Tensor,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """For each expert, the sum over its rows of left^T right, of ``shape``."""
    rows_class = rows_class_of(len(left if left_index is None else left_index) // shape[0])
    out = torch.empty(shape, dtype=dtype, device=left.device)
    return run_weight_gradient(left, left_index, right, right_index, start, rows_class, out)


@_weight_gradient.register_fake
def _(left: Tensor, left_index: Any, right: Tensor, right_index: Any, start: Any, shape: Any, dtype: Any) -> Tensor:
    return left.new_empty(shape, dtype=dtype)


def _grid(tiles: Tiles, width: int) -> Any:
    n, device = len(tiles.row), tiles.row.device
    return lambda config: (_programs(config, n * cdiv(width, config["COLS"]), device),)


def _programs(config: dict[str, int], blocks: int, device: torch.device) -> int:
    """How many programs compute ``blocks`` blocks."""
    return min(blocks, config["PER_SM"] * multiprocessors(device) or blocks)


def _precision() -> str:
    """How float32 products are made: exactly, or in TF32 where either of torch's settings allows that."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def run_rows_times_weights(
    a: Tensor,
    w: Tensor,
    tiles: Tiles,
    N: int,
    strides: tuple[int, int],
    bias: Tensor | None = None,
    s_R: Tensor | None = None,
) -> Tensor:
    out, K = a.new_empty(len(a), N), a.shape[1]
    w_reader = matrix_reader(w.view(-1, K if strides[1] == 1 else N), K)
    a_reader = None if w_reader is None else matrix_reader(a, K)
    rows_times_weights[_grid(tiles, N)](
        a, w=w, bias=bias, s=s_R, out=out, **tiles._asdict(), E=len(w), N=N, K=K, W_N=strides[0], W_K=strides[1],
        TILE=TILE, PRECISION=_precision(), a_reader=a_reader, w_reader=None if a_reader is None else w_reader,
    )  # fmt: skip
    return out


def run_weight_gradient(
    left: Tensor,
    left_index: Tensor | None,
    right: Tensor,
    right_index: Tensor | None,
    start: Tensor,
    rows_class: int,
    out: Tensor,
) -> Tensor:
    """``out``, contiguous, of shape (e, ..., M, N) or (e, M, N). start, rows_class: see ``Tiles``."""
    M, N = left.shape[1], right.shape[1]

    def grid(config: dict[str, int]) -> tuple[int]:
        return (_programs(config, len(out) * cdiv(M, config["ROWS"]) * cdiv(N, config["COLS"]), out.device),)

    weight_gradient[grid](
        left, left_index, right, right_index, out, start, rows_class,
        E=len(out), M=M, N=N, PRECISION=_precision(),
    )  # fmt: skip
    return out


def sum_per_token(dx_RD: Tensor, N: int, index_R: Tensor | None, row_TK: Tensor | None) -> Tensor:
    if index_R is None:
        return dx_RD
    if row_TK is not None:
        return gather_sum(dx_RD, row_TK)
    token_R, order = index_R.sort(stable=True)
    start = torch.searchsorted(token_R, torch.arange(N + 1, device=token_R.device))
    return gather_sum(dx_RD, order, start)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Inputs as ``_forward``, but that parameters may be wider than x. Backward keeps them rounded."""
        x_ND, w13, w2, s_R, b13, b2, *rest, activation = inputs
        rounded = [None if p is None else p.to(x_ND.dtype) for p in (w13, w2, b13, b2)]
        tensors = (x_ND, *rounded[:2], s_R, *rounded[2:], *rest)
        out, h_RnF = _forward(*tensors, activation)
        ctx.save_for_backward(*tensors, h_RnF)
        ctx.activation, ctx.dtype = activation, w13.dtype
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_w13, need_w2, *need_rest = ctx.needs_input_grad[:6]
        x_ND, w13, w2, *_, index_R, row_TK, _, _ = saved = ctx.saved_tensors
        dy, dy_index, needs, dtype = (
            grads[0].contiguous(),
            None if row_TK is None else index_R,
            [need_x, *need_rest],
            ctx.dtype,
        )
        *found, a_RF, dh_RnF, start = _backward(dy, *saved, ctx.activation, needs, dtype)
        dx_ND, *rest = (grad if need else None for grad, need in zip(found, needs, strict=True))
        shape13, shape2, dw13, dw2 = list(w13.shape), list(w2.shape), None, None
        if need_w13:
            dw13 = now_or_later(ctx, 1, lambda: _weight_gradient(dh_RnF, None, x_ND, index_R, start, shape13, dtype))
        if need_w2:
            dw2 = now_or_later(ctx, 2, lambda: _weight_gradient(dy, dy_index, a_RF, None, start, shape2, dtype))
        return dx_ND, dw13, dw2, *rest, None, None, None, None


def triton_expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` in Triton. y_RD (R, D), or with row_TK out_TD."""
    counts_e = torch.as_tensor(o.counts, device=o.x_ND.device)
    tensors = (o.x_ND, o.w13, o.w2, o.weight_R, o.b13, o.b2, o.index_R, o.row_TK)
    return _Experts.apply(*(None if t is None else t.contiguous() for t in tensors), counts_e, o.activation)
