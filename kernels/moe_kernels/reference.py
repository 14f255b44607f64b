"""The oracle: expert math in plain torch operations, one expert after the other, differentiated by autograd.

Every other path is tested against this one in float64. It runs on every device and in every float type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.activation import activate


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
    for x_rD, w13_nFD, w2_DF, b13_nF, b2_D in zip(
        rows_RD.split(counts), w13.unbind(0), w2.unbind(0), b13s, b2s, strict=True
    ):
        h_rnF = F.linear(x_rD, w13_nFD.flatten(0, 1), None if b13_nF is None else b13_nF.flatten())
        parts.append(F.linear(activate(h_rnF.chunk(len(w13_nFD), dim=-1), activation), w2_DF, b2_D))
    y_RD = torch.cat(parts)
    return y_RD if weight_R is None else (y_RD * weight_R[:, None]).to(y_RD.dtype)
