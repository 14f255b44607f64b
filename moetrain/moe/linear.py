"""A linear layer that uses the part of its weight that this rank holds."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def local_part(p: Tensor | None) -> Tensor | None:
    """The part of a parameter that this rank holds: all of a plain tensor, the local tensor of a DTensor."""
    to_local = getattr(p, "to_local", None)
    return p if to_local is None else to_local()


class Linear(nn.Linear):
    """torch's Linear, whose parameters may be DTensors that hold rows or columns of the whole: its input and output
    are plain tensors, and whoever splits the weight splits or sums these."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), as wide as this rank's part of the weight."""
        weight = local_part(self.weight)
        assert weight is not None
        return F.linear(x, weight, local_part(self.bias))
