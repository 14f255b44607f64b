"""A linear layer that uses the part of its weight that this rank holds."""

from __future__ import annotations

from typing import Protocol

from moe_kernels import linear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_part(p: Tensor | None) -> Tensor | None:
    """The part of a parameter that this rank holds: all of a plain tensor, the local tensor of a DTensor."""
    return p.to_local() if isinstance(p, DTensor) else p


class Gather(Protocol):
    """What a module does with tensors (tokens first, features last) before it uses weights of which this rank holds a
    part: the same tensors for the tokens of all ranks that hold the other parts."""

    def __call__(self, *xs: Tensor) -> tuple[Tensor, ...]: ...


def all_here(*xs: Tensor) -> tuple[Tensor, ...]:
    """The ``Gather`` of a module that is whole: all tokens are here already."""
    return xs


class Linear(nn.Linear):
    """torch's Linear, whose parameters may be DTensors that hold rows or columns of the whole: its input and output
    are plain tensors, and whoever splits the weight splits or sums these."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), as wide as this rank's part of the weight."""
        weight = local_part(self.weight)
        assert weight is not None
        return linear(x, weight, local_part(self.bias))
