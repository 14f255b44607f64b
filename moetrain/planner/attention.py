"""Fused attention on the meta device: what it keeps for backward, with no scores of whole sequences.

Assumed of every fused kernel (flash, memory-efficient, cuDNN): queries, keys, values, the output, one float32 log-sum
of exponentials per head and query, and the mask where there is one. The oracle ``backend=math`` and ring attention are
not fused and run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def fused_attention(device: str) -> Iterator[None]:
    """In the meantime torch's ``scaled_dot_product_attention`` is ``fused`` for meta tensors, also where backward
    computes a block again (which is why this is no TorchFunctionMode: those do not reach into backward)."""
    original = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        return fused(q, k, v, attn_mask, device) if q.is_meta else original(q, k, v, attn_mask, **more)

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, device: str) -> Tensor:
    """q (B, H, S, d), k (B, G, N, d), v (B, G, N, v) -> (B, H, S, v)."""
    width = v.shape[-1]
    if device == "cpu" and width < q.shape[-1]:  # as model.attention.kernels does it
        v = F.pad(v, (0, q.shape[-1] - width))
    if device == "cuda" and mask is not None and q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return _Fused.apply(q, k, v, mask)[..., :width]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, H, S, _ = q.shape
        # (B, S, H, v) in memory, as the fused kernels write it
        out = q.new_empty(B, S, H, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(B, H, S, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
