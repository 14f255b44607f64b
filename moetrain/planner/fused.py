"""Fused kernels on the meta device, where torch would spell them out: what they keep for backward, and no more.

Attention, assumed of every fused kernel (flash, memory-efficient, cuDNN): queries, keys, values, the output, one
float32 log-sum of exponentials per head and query, and where there is a mask, the mask in the queries' dtype. RMSNorm
on CUDA: the input and one float32 factor per row. The oracle ``backend=math`` and ring attention are not fused and run
as they are. The loss: on CUDA chunks of logits are larger, and their softmax needs no room but where tp splits them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from moe_kernels import loss, loss_softmax
from moe_kernels.fp8 import TILE
from moe_kernels.gpu.available import triton_obstacle
from torch import Tensor

from moetrain.model import norm as norms
from moetrain.model.attention import packed


@contextmanager
def fused_kernels(device: str) -> Iterator[None]:
    """In the meantime torch's ``scaled_dot_product_attention`` and the model's ``rms_norm`` are those of ``device``
    ("cuda" or "cpu") for meta tensors, also where backward computes a block again (no TorchFunctionMode reaches into
    backward). ``moe_kernels.rms_norm`` and its attention for the CPU are on meta what they are there."""
    attend, norm, runs_native = F.scaled_dot_product_attention, norms.rms_norm, packed.runs_native

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        return fused_attention(q, k, v, attn_mask, device) if q.is_meta else attend(q, k, v, attn_mask, **more)

    def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
        if not x.is_meta or device != "cuda":
            return norm(x, weight, eps, offset=offset)
        plain = weight.dtype == x.dtype and offset == 0  # else both are float32 copies there
        wide = x.dtype if plain else torch.promote_types(x.dtype, torch.float32)
        return _Norm.apply(x.to(wide), weight.to(wide)).to(x.dtype)

    softmax, chunk, block = loss._softmax_, loss.CHUNK_LOGITS, loss_softmax.BLOCK_LOGITS

    def softmax_(p: Tensor, targets: Tensor, above: Tensor | None, losses: Tensor, how: Any) -> None:
        if how.part is not None or triton_obstacle(torch.device(device), p.dtype) is not None:
            softmax(p, targets, above, losses, how)

    if device == "cuda":
        loss._softmax_ = softmax_
        loss.CHUNK_LOGITS, loss_softmax.BLOCK_LOGITS = loss.CHUNK_LOGITS_GPU, loss_softmax.BLOCK_LOGITS_GPU
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    norms.rms_norm = rms_norm  # type: ignore[assignment]
    packed.runs_native = lambda place: device == "cpu" and place.type in ("cpu", "meta")
    try:
        yield
    finally:
        F.scaled_dot_product_attention, norms.rms_norm, packed.runs_native = attend, norm, runs_native
        loss._softmax_, loss.CHUNK_LOGITS, loss_softmax.BLOCK_LOGITS = softmax, chunk, block


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, device: str) -> Tensor:
    """q (B, H, S, d), k (B, G, N, d), v (B, G, N, v) -> (B, H, S, v)."""
    width = v.shape[-1]
    if device == "cpu" and width < q.shape[-1]:  # as model.attention.kernels does it
        v = F.pad(v, (0, q.shape[-1] - width))
    if device == "cuda" and mask is not None and q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if mask is not None:  # torch adds it to the scores, so it makes numbers of it first
        mask = torch.empty_like(mask, dtype=q.dtype)
    return _Attention.apply(q, k, v, mask)[..., :width]


class _Attention(torch.autograd.Function):
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


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def scratch(operator: str, args: Sequence[Any]) -> int:
    """Bytes that ``operator`` of Triton's experts holds beside its arguments and results: inner activations and the
    gradients of gathered rows; in FP8 inner gradients and what is rounded, too (scales left out)."""
    if operator == "moe_kernels::experts_forward":
        x_ND, w2, index_R = args[0], args[2], args[6]
        return int(len(x_ND if index_R is None else index_R) * w2.shape[2] * x_ND.itemsize)
    if operator == "moe_kernels::experts_backward":
        w2, index_R, h_RnF = args[3], args[7], args[10]
        return int((index_R is not None) * len(h_RnF) * w2.shape[1] * h_RnF.itemsize)
    if operator == "moe_kernels::fp8_experts_forward":
        x_ND, w13, w2, index_R = args[0], args[1], args[2], args[6]
        return int(max(w13.numel(), w2.numel() + len(x_ND if index_R is None else index_R) * w2.shape[2]))
    if operator == "moe_kernels::fp8_experts_backward":
        dy, w13, w2, index_R, h_RnF = args[0], args[1], args[2], args[6], args[11]
        (experts, D, width), (R, both) = w2.shape, h_RnF.shape
        wide = R * (both + 2 * width + (index_R is not None) * D) * h_RnF.itemsize
        turned = (R + experts * TILE) * (both + width + D)  # for the weights' gradients, in whole tiles
        return int(wide + h_RnF.numel() + dy.numel() + w13.numel() + turned)
    return 0
