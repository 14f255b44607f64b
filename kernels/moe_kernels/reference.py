"""The oracle: expert math in plain torch operations, one expert after the other, differentiated by autograd.

Every other path is tested against this one in float64. It runs on every device and in every float type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("swiglu", "gpt_oss")
# GPT-OSS (arXiv 2508.10925): gate and up are clamped, the gate's sigmoid is sharpened, up is shifted by one.
GPT_OSS_ALPHA = 1.702
GPT_OSS_LIMIT = 7.0


def activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Gated activation of ``gate`` and ``up``, two tensors of one shape; the result has that shape.

    ``swiglu`` (arXiv 2002.05202): silu(gate) * up. ``gpt_oss``: with gate capped at 7 and up held to [-7, 7],
    gate * sigmoid(1.702 * gate) * (up + 1).
    """
    if activation == "swiglu":
        return F.silu(gate) * up
    gate = gate.clamp(max=GPT_OSS_LIMIT)
    up = up.clamp(min=-GPT_OSS_LIMIT, max=GPT_OSS_LIMIT)
    return gate * torch.sigmoid(GPT_OSS_ALPHA * gate) * (up + 1)


def loop_expert_mlp(
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
    """``moe_kernels.expert_mlp`` by its definition. y_RD (R, D)."""
    rows_RD = x_ND if index_R is None else x_ND.index_select(0, index_R)
    # unbind, not w[i]: the backward of each w[i] would build a zero gradient as large as w.
    b13s = [None] * len(counts) if b13 is None else b13.unbind(0)
    b2s = [None] * len(counts) if b2 is None else b2.unbind(0)
    parts = []
    for x_rD, w13_2FD, w2_DF, b13_2F, b2_D in zip(
        rows_RD.split(counts), w13.unbind(0), w2.unbind(0), b13s, b2s, strict=True
    ):
        gate_up = F.linear(x_rD, w13_2FD.flatten(0, 1), None if b13_2F is None else b13_2F.flatten())
        gate, up = gate_up.chunk(2, dim=-1)
        parts.append(F.linear(activate(gate, up, activation), w2_DF, b2_D))
    y_RD = torch.cat(parts)
    return y_RD if weight_R is None else (y_RD * weight_R[:, None]).to(y_RD.dtype)
