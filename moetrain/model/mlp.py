"""The dense SwiGLU MLP (arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.linear import Gather, Linear, all_here


class MLP(nn.Module):
    """w_down(silu(w_gate x) * w_up x), without biases."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.w_gate = Linear(dim, inner, bias=False)
        self.w_up = Linear(dim, inner, bias=False)
        self.w_down = Linear(inner, dim, bias=False)
        self.gather: Gather = all_here

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        (x,) = self.gather(x)
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))
