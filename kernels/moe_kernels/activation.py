"""Gated activations and their derivatives on blocks of rows, for the autograd functions of this package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.reference import GPT_OSS_ALPHA, GPT_OSS_LIMIT, activate


def activation_forward(gate_up: Tensor, activation: str) -> Tensor:
    """gate_up (r, 2F), gate then up -> a (r, F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "swiglu":
        return F.silu(gate).mul_(up)
    return activate(gate, up, activation)


def activation_backward(
    gate_up: Tensor, grad_a: Tensor, weight: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Recompute and differentiate a' = weight * act(gate, up).

    gate_up (r, 2F); grad_a (r, F), the gradient of a', overwritten; weight (r, 1) or None.
    Returns a' (r, F), the gradient of gate_up (r, 2F), and the gradient of weight (r,) or None.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    grad = torch.empty_like(gate_up)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    if activation == "swiglu":
        silu = F.silu(gate)
        a = silu * up
        grad_weight = _apply_weight(a, grad_a, weight)
        torch.mul(grad_a, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_a.mul_(up), gate, grad_input=grad_gate)
        return a, grad, grad_weight
    capped = gate.clamp(max=GPT_OSS_LIMIT)
    shifted = up.clamp(min=-GPT_OSS_LIMIT, max=GPT_OSS_LIMIT) + 1
    sigmoid = torch.sigmoid(GPT_OSS_ALPHA * capped)
    a = capped * sigmoid * shifted
    grad_weight = _apply_weight(a, grad_a, weight)
    torch.mul(grad_a, capped * sigmoid, out=grad_up)
    grad_up.mul_(up.abs() <= GPT_OSS_LIMIT)
    slope = sigmoid * (1 + GPT_OSS_ALPHA * capped * (1 - sigmoid))
    torch.mul(grad_a * shifted, slope * (gate <= GPT_OSS_LIMIT), out=grad_gate)
    return a, grad, grad_weight


def _apply_weight(a: Tensor, grad_a: Tensor, weight: Tensor | None) -> Tensor | None:
    """Scale ``a`` and ``grad_a`` by ``weight`` in place; returns the weight's gradient, <grad_a, a> by row."""
    if weight is None:
        return None
    grad_weight = torch.linalg.vecdot(grad_a.to(weight.dtype), a.to(weight.dtype))
    a.mul_(weight)
    grad_a.mul_(weight)
    return grad_weight
