"""The fast CPU path: one autograd function for the whole expert computation.

Backward follows SonicMoE (arXiv 2512.14080, section 4): only the layer input, the pre-activation and the routing are
kept; the activation is computed again, and the routing weight's gradient is <dA', A> over the expert width, so the
down-projection's output is never needed. The routing weight multiplies the activation, not the output, for the same
reason. Gathered rows live for one expert at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.activation import activation_backward, activation_forward


class _ExpertMLP(torch.autograd.Function):
    """Inputs as ``moe_kernels.expert_mlp``; w13 comes flattened to (e, 2F, D) and b13 to (e, 2F)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w13: Tensor,
        w2: Tensor,
        weight_R: Tensor | None,
        b13: Tensor | None,
        b2: Tensor | None,
        index_R: Tensor | None,
        counts: list[int],
        activation: str,
    ) -> Tensor:
        R = sum(counts)
        gate_up_RF2 = x_ND.new_empty(R, w13.shape[1])
        y_RD = x_ND.new_empty(R, x_ND.shape[1])
        start = 0
        for e, (n, w13_e, w2_e) in enumerate(zip(counts, w13.unbind(0), w2.unbind(0), strict=True)):
            if n == 0:
                continue
            rows = slice(start, start + n)
            h = gate_up_RF2[rows]
            torch.mm(_take(x_ND, index_R, rows), w13_e.t(), out=h)
            if b13 is not None:
                h += b13[e]
            a = activation_forward(h, activation)
            if weight_R is not None:
                a *= weight_R[rows, None]
            torch.mm(a, w2_e.t(), out=y_RD[rows])
            if b2 is not None:
                y_RD[rows] += b2[e] if weight_R is None else weight_R[rows, None] * b2[e]
            start += n
        ctx.save_for_backward(x_ND, w13, w2, weight_R, b13, b2, index_R, gate_up_RF2)
        ctx.counts, ctx.activation = counts, activation
        return y_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w13, w2, weight_R, b13, b2, index_R, gate_up_RF2 = ctx.saved_tensors
        grad_y_RD = grads[0].contiguous()
        need_x, need_w13, need_w2, need_weight, need_b13, need_b2 = ctx.needs_input_grad[:6]
        grad_w13 = torch.empty_like(w13) if need_w13 else None
        grad_w2 = torch.empty_like(w2) if need_w2 else None
        grad_weight_R = torch.empty_like(weight_R) if need_weight else None
        grad_b13 = torch.zeros_like(b13) if need_b13 else None
        grad_b2 = torch.zeros_like(b2) if need_b2 else None
        grad_rows_RD = torch.empty_like(grad_y_RD) if need_x else None
        start = 0
        for e, n in enumerate(ctx.counts):
            if n == 0:
                for grad in (grad_w13, grad_w2):
                    if grad is not None:
                        grad[e].zero_()
                continue
            rows = slice(start, start + n)
            start += n
            dy = grad_y_RD[rows]
            s = None if weight_R is None else weight_R[rows, None]
            da = torch.mm(dy, w2[e])
            a, dh, ds = activation_backward(gate_up_RF2[rows], da, s, ctx.activation)
            if grad_w2 is not None:
                torch.mm(dy.t(), a, out=grad_w2[e])
            if grad_w13 is not None:
                torch.mm(dh.t(), _take(x_ND, index_R, rows), out=grad_w13[e])
            if grad_rows_RD is not None:
                torch.mm(dh, w13[e], out=grad_rows_RD[rows])
            if grad_b13 is not None:
                torch.sum(dh, 0, out=grad_b13[e])
            if b2 is not None:
                if ds is not None:
                    ds += torch.mv(dy, b2[e]).to(ds.dtype)
                if grad_b2 is not None:
                    torch.sum(dy if s is None else dy * s.to(dy.dtype), 0, out=grad_b2[e])
            if grad_weight_R is not None:
                assert ds is not None
                grad_weight_R[rows] = ds
        grad_x_ND = grad_rows_RD
        if grad_rows_RD is not None and index_R is not None:
            grad_x_ND = torch.zeros_like(x_ND).index_add_(0, index_R, grad_rows_RD)
        return grad_x_ND, grad_w13, grad_w2, grad_weight_R, grad_b13, grad_b2, None, None, None


def _take(x_ND: Tensor, index_R: Tensor | None, rows: slice) -> Tensor:
    return x_ND[rows] if index_R is None else x_ND.index_select(0, index_R[rows])


def cpu_expert_mlp(
    x_ND: Tensor,
    counts: list[int],
    w13: Tensor,
    w2: Tensor,
    index_R: Tensor | None,
    weight_R: Tensor | None,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: str,
) -> Tensor:
    """``moe_kernels.expert_mlp`` on CPU. y_RD (R, D)."""
    b13 = None if b13 is None else b13.flatten(1, 2)
    return _ExpertMLP.apply(x_ND, w13.flatten(1, 2), w2, weight_R, b13, b2, index_R, counts, activation)
