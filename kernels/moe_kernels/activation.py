"""Gated activations and their derivatives on blocks of rows, in place, for the autograd functions of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.reference import GPT_OSS_ALPHA, GPT_OSS_LIMIT, activate


def activation_forward(h: Tensor, activation: str, *, out: Tensor) -> None:
    """out (r, F) = act(gate, up), with h (r, 2F) the gate then up."""
    gate, up = h.chunk(2, dim=-1)
    if activation == "swiglu":
        torch.ops.aten.silu.out(gate, out=out)
        out.mul_(up)
    else:
        out.copy_(activate(gate, up, activation))


def activation_backward(
    h: Tensor, da: Tensor, s: Tensor | None, activation: str, *, a: Tensor, dh: Tensor
) -> Tensor | None:
    """Compute a = s * act(gate, up) again, and its derivatives.

    h (r, 2F): gate then up. da (r, F): the gradient of a; overwritten. s (r, 1) or None for 1.
    Fills a (r, F) and dh (r, 2F), the gradient of h. Returns the gradient of s (r,), float32 or wider, or None.
    """
    gate, up = h.chunk(2, dim=-1)
    dgate, dup = dh.chunk(2, dim=-1)
    if activation == "swiglu":
        silu = torch.ops.aten.silu.out(gate, out=dup)
        torch.mul(silu, up, out=a)
        ds = _weigh(a, da, s)
        dup.mul_(da)
        torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)
        return ds
    capped = gate.clamp(max=GPT_OSS_LIMIT)
    shifted = up.clamp(min=-GPT_OSS_LIMIT, max=GPT_OSS_LIMIT) + 1
    sigmoid = torch.sigmoid(GPT_OSS_ALPHA * capped)
    glu = capped * sigmoid
    torch.mul(glu, shifted, out=a)
    ds = _weigh(a, da, s)
    # A clamped value passes no gradient; at the limit itself it does, as torch.clamp has it.
    torch.mul(da * glu, up.abs() <= GPT_OSS_LIMIT, out=dup)
    slope = sigmoid * (1 + GPT_OSS_ALPHA * capped * (1 - sigmoid))
    torch.mul(da * shifted, slope * (gate <= GPT_OSS_LIMIT), out=dgate)
    return ds


def _weigh(a: Tensor, da: Tensor, s: Tensor | None) -> Tensor | None:
    """Scale ``a`` and ``da`` by ``s`` in place; returns the gradient of s, <da, a> by row."""
    if s is None:
        return None
    ds = torch.sum(da * a, dim=-1, dtype=torch.promote_types(a.dtype, torch.float32))
    a.mul_(s)
    da.mul_(s)
    return ds
