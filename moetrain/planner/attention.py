"""Fused attention on the meta device: what it keeps for backward, with no scores of whole sequences.

Assumed of every fused kernel (flash, memory-efficient, cuDNN): queries, keys, values, the output, one float32 log-sum
of exponentials per head and query, and the mask where there is one. The oracle ``backend=math`` and ring attention are
not fused and run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FusedAttention(TorchFunctionMode):
    """While active, ``scaled_dot_product_attention`` is that of ``device`` ("cuda" or "cpu") on meta tensors."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            q, k, v = args
            return fused(q, k, v, kwargs.get("attn_mask"), self.device)
        return func(*args, **kwargs)


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
