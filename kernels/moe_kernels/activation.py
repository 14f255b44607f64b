"""Gated activations and their derivatives on an expert's rows, in place, for the autograd functions of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.reference import GPT_OSS_ALPHA, GPT_OSS_LIMIT, activate


def activation_forward(h: Tensor, s: Tensor | None, activation: str, *, out: Tensor) -> None:
    """out (r, F) = s * act(gate, up), with h (r, 2F) the gate then up, and s (r, 1) or None for 1."""
    gate, up = h.chunk(2, dim=-1)
    if activation == "swiglu":
        torch.ops.aten.silu.out(gate, out=out)
        out.mul_(up)
    else:
        out.copy_(activate(gate, up, activation))
    if s is not None:
        out.mul_(s)


def activation_backward(
    h: Tensor, da: Tensor, s: Tensor | None, activation: str, *, a: Tensor, dh: Tensor, ds: Tensor | None
) -> None:
    """Compute a = s * act(gate, up) again, and its derivatives.

    h (r, 2F): gate then up. da (r, F): the gradient of a; overwritten. s (r, 1) or None for 1.
    Fills a (r, F); dh (r, 2F), the gradient of h; and ds (r,), float32 or wider, the gradient of s, if given.
    """
    (_swiglu_backward if activation == "swiglu" else _gpt_oss_backward)(h, da, s, a, dh, ds)


def _swiglu_backward(h: Tensor, da: Tensor, s: Tensor | None, a: Tensor, dh: Tensor, ds: Tensor | None) -> None:
    (gate, up), (dgate, dup) = h.chunk(2, dim=-1), dh.chunk(2, dim=-1)
    silu = torch.ops.aten.silu.out(gate, out=dup)
    torch.mul(silu, up, out=a)
    _weigh(a, da, s, ds)
    dup.mul_(da)
    torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)


def _gpt_oss_backward(h: Tensor, da: Tensor, s: Tensor | None, a: Tensor, dh: Tensor, ds: Tensor | None) -> None:
    (gate, up), (dgate, dup) = h.chunk(2, dim=-1), dh.chunk(2, dim=-1)
    capped = gate.clamp(max=GPT_OSS_LIMIT)
    shifted = up.clamp(min=-GPT_OSS_LIMIT, max=GPT_OSS_LIMIT) + 1
    sigmoid = torch.sigmoid(GPT_OSS_ALPHA * capped)
    glu = capped * sigmoid
    torch.mul(glu, shifted, out=a)
    _weigh(a, da, s, ds)
    # A clamped value passes no gradient; at the limit itself it does, as torch.clamp has it.
    torch.mul(da * glu, up.abs() <= GPT_OSS_LIMIT, out=dup)
    slope = sigmoid * (1 + GPT_OSS_ALPHA * capped * (1 - sigmoid))
    torch.mul(da * shifted, slope * (gate <= GPT_OSS_LIMIT), out=dgate)


def _weigh(a: Tensor, da: Tensor, s: Tensor | None, ds: Tensor | None) -> None:
    """Scale ``a`` and ``da`` by ``s`` in place, after writing <da, a> of each row to ``ds``."""
    if s is None:
        return
    if ds is not None:
        torch.sum(da * a, dim=-1, dtype=ds.dtype, out=ds)
    a.mul_(s)
    da.mul_(s)
