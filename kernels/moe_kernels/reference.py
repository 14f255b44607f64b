"""The oracle: expert math in plain torch operations, one expert after the other, differentiated by autograd.

Every other path is tested against this one in float64. It runs on every device and in every float type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.activation import activate
from moe_kernels.operands import Operands


def loop_expert_mlp(o: Operands) -> Tensor:
    """``moe_kernels.expert_mlp`` by its definition. y_RD (R, D), or with row_TK out_TD."""
    counts = o.row_counts
    # unbind, not w[i]: the backward of each w[i] would build a zero gradient as large as w.
    b13s = [None] * len(counts) if o.b13 is None else o.b13.unbind(0)
    b2s = [None] * len(counts) if o.b2 is None else o.b2.unbind(0)
    parts = []
    for x_rD, w13_nFD, w2_DF, b13_nF, b2_D in zip(
        o.rows().split(counts), o.w13.unbind(0), o.w2.unbind(0), b13s, b2s, strict=True
    ):
        h_rnF = F.linear(x_rD, w13_nFD.flatten(0, 1), None if b13_nF is None else b13_nF.flatten())
        parts.append(F.linear(activate(h_rnF.chunk(len(w13_nFD), dim=-1), o.activation), w2_DF, b2_D))
    return o.weighted(torch.cat(parts))
