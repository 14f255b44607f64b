"""The activations of experts, each an entry of ``ACTIVATIONS``: its value for autograd, and value and derivative in
place for the autograd functions of this package.

Gated ones (arXiv 2002.05202) have two input matrices and are f(gate) * up, plain ones have one and are f(up).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# GPT-OSS (arXiv 2508.10925): gate and up are clamped, the gate's sigmoid is sharpened, up is shifted by one.
GPT_OSS_ALPHA = 1.702
GPT_OSS_LIMIT = 7.0
# SwiGLU with gate and up clamped: DeepSeek-V4's swiglu_limit, and that of GLM and Hunyuan models after it.
SWIGLU_LIMIT = 10.0

aten = torch.ops.aten


class Function(NamedTuple):
    """A function f of one number.

    value: x -> f(x), for autograd. write(x, out): f(x). pull(above, x, out): above * f'(x). Of one shape and dtype, and
    ``out`` is no other's storage.
    """

    value: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], object]
    pull: Callable[[Tensor, Tensor, Tensor], object]


SILU = Function(
    F.silu,
    lambda x, out: aten.silu.out(x, out=out),
    lambda above, x, out: aten.silu_backward.grad_input(above, x, grad_input=out),
)
# Gemma's and GPT-2's GELU, the tanh approximation (arXiv 1606.08415, section 2)
GELU = Function(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x, out: aten.gelu.out(x, approximate="tanh", out=out),
    lambda above, x, out: aten.gelu_backward.grad_input(above, x, approximate="tanh", grad_input=out),
)
RELU = Function(
    F.relu,
    lambda x, out: aten.relu.out(x, out=out),
    lambda above, x, out: aten.threshold_backward.grad_input(above, x, 0, grad_input=out),
)
# Primer (arXiv 2109.08668)
SQUARED_RELU = Function(
    lambda x: F.relu(x).square(),
    lambda x, out: aten.relu.out(x, out=out).square_(),
    lambda above, x, out: aten.relu.out(x, out=out).mul_(above).mul_(2),
)


class Activation(NamedTuple):
    """An activation of h (r, matrices * F), made by so many input matrices of an expert; its value is (r, F).

    value: the parts of h (r, F) -> value, for autograd. write(h, out): out = value. pull(h, da, a, dh, weigh): a =
    value, ``weigh()`` (which may scale a and da), dh = the gradient of h for da, that of the value, which is lost.
    """

    matrices: int
    value: Callable[..., Tensor]
    write: Callable[[Tensor, Tensor], object]
    pull: Callable[[Tensor, Tensor, Tensor, Tensor, Callable[[], None]], object]


def _gated(f: Function) -> Activation:
    """f(gate) * up."""

    def write(h: Tensor, out: Tensor) -> None:
        gate, up = h.chunk(2, dim=-1)
        f.write(gate, out)
        out.mul_(up)

    def pull(h: Tensor, da: Tensor, a: Tensor, dh: Tensor, weigh: Callable[[], None]) -> None:
        (gate, up), (dgate, dup) = h.chunk(2, dim=-1), dh.chunk(2, dim=-1)
        f.write(gate, dup)
        torch.mul(dup, up, out=a)
        weigh()
        dup.mul_(da)
        f.pull(da.mul_(up), gate, dgate)

    return Activation(2, lambda gate, up: f.value(gate) * up, write, pull)


def _plain(f: Function) -> Activation:
    """f(up)."""

    def pull(h: Tensor, da: Tensor, a: Tensor, dh: Tensor, weigh: Callable[[], None]) -> None:
        f.write(h, a)
        weigh()
        f.pull(da, h, dh)

    return Activation(1, f.value, f.write, pull)


def _clamped(limit: float, alpha: float, shift: float) -> Activation:
    """With gate capped at ``limit`` and up held within it: gate * sigmoid(alpha * gate) * (up + shift)."""

    def value(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up + shift)

    def write(h: Tensor, out: Tensor) -> None:
        out.copy_(value(*h.chunk(2, dim=-1)))

    def pull(h: Tensor, da: Tensor, a: Tensor, dh: Tensor, weigh: Callable[[], None]) -> None:
        (gate, up), (dgate, dup) = h.chunk(2, dim=-1), dh.chunk(2, dim=-1)
        capped, shifted = gate.clamp(max=limit), up.clamp(min=-limit, max=limit) + shift
        sigmoid = torch.sigmoid(alpha * capped)
        glu = capped * sigmoid
        torch.mul(glu, shifted, out=a)
        weigh()
        # A clamped value passes no gradient; at the limit itself it does, as torch.clamp has it.
        torch.mul(da * glu, up.abs() <= limit, out=dup)
        slope = sigmoid * (1 + alpha * capped * (1 - sigmoid))
        torch.mul(da * shifted, slope * (gate <= limit), out=dgate)

    return Activation(2, value, write, pull)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": _gated(SILU),
    "geglu": _gated(GELU),
    "reglu": _gated(RELU),
    "gpt_oss": _clamped(GPT_OSS_LIMIT, GPT_OSS_ALPHA, 1.0),
    "swiglu_clamped": _clamped(SWIGLU_LIMIT, 1.0, 0.0),
    "gelu": _plain(GELU),
    "relu2": _plain(SQUARED_RELU),
}


def activate(parts: Sequence[Tensor], activation: str) -> Tensor:
    """The activation of what an expert's input matrices give: gate and up, or up alone. Tensors of one shape.

    Raises:
        ValueError: no activation is called that, or it takes another number of tensors.
    """
    if activation not in ACTIVATIONS or ACTIVATIONS[activation].matrices != len(parts):
        raise ValueError(
            f"no activation of {len(parts)} tensors is called {activation!r}; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[activation].value(*parts)


def activation_forward(h: Tensor, s: Tensor | None, activation: str, *, out: Tensor) -> None:
    """out (r, F) = s * act(h), with h (r, n F) the n parts side by side, and s (r, 1) or None for 1."""
    ACTIVATIONS[activation].write(h, out)
    if s is not None:
        out.mul_(s)


def activation_backward(
    h: Tensor, da: Tensor, s: Tensor | None, activation: str, *, a: Tensor, dh: Tensor, ds: Tensor | None
) -> None:
    """Compute a = s * act(h) again, and its derivatives.

    h (r, n F). da (r, F): the gradient of a; overwritten. s (r, 1) or None for 1.
    Fills a (r, F); dh (r, n F), the gradient of h; and ds (r,), float32 or wider, the gradient of s, if given.
    """

    def weigh() -> None:
        if s is None:
            return
        if ds is not None:
            torch.sum(da * a, dim=-1, dtype=ds.dtype, out=ds)
        a.mul_(s)
        da.mul_(s)

    ACTIVATIONS[activation].pull(h, da, a, dh, weigh)
