"""The activations of ``moe_kernels.activation`` in Triton, on float32 tiles. NaN passes through as it does in torch."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe_kernels import activation

_ALPHA: tl.constexpr = tl.constexpr(activation.GPT_OSS_ALPHA)
_LIMIT: tl.constexpr = tl.constexpr(activation.GPT_OSS_LIMIT)
_SWIGLU_LIMIT: tl.constexpr = tl.constexpr(activation.SWIGLU_LIMIT)


@triton.jit
def _function(x, ACT: tl.constexpr):
    """(f(x), f'(x)), f being the function inside the activation; the half that is not used costs nothing."""
    if ACT == "swiglu":
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    elif ACT == "geglu" or ACT == "gelu":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACT == "reglu":
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACT == "relu2")
        r = tl.where(x < 0, 0.0, x)
        return r * r, 2 * r


@triton.jit
def act(gate, up, ACT: tl.constexpr, GATED: tl.constexpr):
    """The activation; plain ones take ``up`` alone."""
    if ACT == "gpt_oss":
        return _clamped(gate, up, _LIMIT, _ALPHA, 1.0)
    elif ACT == "swiglu_clamped":
        return _clamped(gate, up, _SWIGLU_LIMIT, 1.0, 0.0)
    elif GATED:
        return _function(gate, ACT)[0] * up
    else:
        return _function(up, ACT)[0]


@triton.jit
def act_slopes(gate, up, ACT: tl.constexpr, GATED: tl.constexpr):
    """The derivatives of ``act`` in gate and up. A clamped value passes no gradient; at the limit itself it does."""
    if ACT == "gpt_oss":
        return _clamped_slopes(gate, up, _LIMIT, _ALPHA, 1.0)
    elif ACT == "swiglu_clamped":
        return _clamped_slopes(gate, up, _SWIGLU_LIMIT, 1.0, 0.0)
    elif GATED:
        f, slope = _function(gate, ACT)
        return up * slope, f
    else:
        slope = _function(up, ACT)[1]
        return slope, slope


@triton.jit
def _clamped(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr):
    capped, shifted = tl.where(gate > LIMIT, LIMIT, gate), _within(up, LIMIT) + SHIFT
    return capped * tl.sigmoid(ALPHA * capped) * shifted


@triton.jit
def _clamped_slopes(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr):
    capped, shifted = tl.where(gate > LIMIT, LIMIT, gate), _within(up, LIMIT) + SHIFT
    s = tl.sigmoid(ALPHA * capped)
    slope = tl.where(gate > LIMIT, 0.0, s * (1 + ALPHA * capped * (1 - s)))
    return shifted * slope, tl.where(tl.abs(up) > LIMIT, 0.0, capped * s)


@triton.jit
def _within(up, LIMIT: tl.constexpr):
    return tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
