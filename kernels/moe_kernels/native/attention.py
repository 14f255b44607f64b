"""Causal attention on CPU through ``attention.cpp``: one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.native.library import call


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGw: Tensor, first_BS: Tensor, scale: float) -> Tensor:
        B, S, H, _ = q_BSHd.shape
        out = v_BSGw.new_empty(B, S, H, v_BSGw.shape[3])
        lse_BHS = q_BSHd.new_empty(B, H, S, dtype=torch.float32)
        call(
            "attention_forward",
            _half(q_BSHd),
            q_BSHd,
            k_BSGd,
            v_BSGw,
            first_BS,
            out,
            lse_BHS,
            *_sizes(q_BSHd, v_BSGw, scale),
        )
        ctx.save_for_backward(q_BSHd, k_BSGd, v_BSGw, first_BS, out, lse_BHS)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_BS, out, lse_BHS = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        above = grads[0].contiguous()
        call(
            "attention_backward", _half(q), q, k, v, first_BS, out, lse_BHS, above, dq, dk, dv, *_sizes(q, v, ctx.scale)
        )
        return dq, dk, dv, None, None


def _half(t: Tensor) -> int:
    return int(t.dtype == torch.bfloat16)


def _sizes(q: Tensor, v: Tensor, scale: float) -> tuple[int | float, ...]:
    B, S, H, d = q.shape
    return B, S, H, v.shape[2], d, v.shape[3], float(scale), torch.get_num_threads()


def native_attention(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGw: Tensor, first_BS: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v -> (B, S, H, w), for float32 or bfloat16: query i sees the keys from first[i] to itself.

    Keys of group g are those of the H / G heads from g H / G on. Weights are rounded to v's dtype, sums are float32.

    Backward keeps q, k, v, the output, and the logarithm of each query's sum.
    """
    q, k, v, first_BS = (t.contiguous() for t in (q_BSHd, k_BSGd, v_BSGw, first_BS))
    return _Attention.apply(q, k, v, first_BS, scale)
