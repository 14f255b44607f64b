"""The MLP that every token passes: gated (arXiv 2002.05202) or plain."""

from __future__ import annotations

from moe_kernels import ACTIVATIONS, activate
from torch import Tensor, nn

from moetrain.moe.linear import Gather, Linear, all_here


class MLP(nn.Module):
    """w_down(act(w_gate x, w_up x)), or w_down(act(w_up x)) with a plain activation; without biases.

    activation: one of ``moe_kernels.ACTIVATIONS``. w_gate: None with a plain one.
    """

    def __init__(self, dim: int, inner: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        gated = ACTIVATIONS[activation].matrices == 2
        self.w_gate = Linear(dim, inner, bias=False) if gated else None
        self.w_up = Linear(dim, inner, bias=False)
        self.w_down = Linear(inner, dim, bias=False)
        self.gather: Gather = all_here

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        (x,) = self.gather(x)
        return self.w_down(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        """What goes into w_down: x (..., D) -> (..., F)."""
        parts = [w(x) for w in (self.w_gate, self.w_up) if w is not None]
        return activate(parts, self.activation)
