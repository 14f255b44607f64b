"""RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from moe_kernels import rms_norm
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last dimension. Statistics of half-precision inputs are taken in float32,
    and so is all else where there is an offset (Gemma, arXiv 2403.08295: 1), since 1 + w loses most of w in bfloat16.
    """

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return rms_norm(x, self.weight, self.eps, offset=self.offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
