"""The activations of ``moe_kernels.activation`` in Triton, on float32 tiles. NaN passes through as it does in torch."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from moe_kernels import activation

_ALPHA: tl.constexpr = tl.constexpr(activation.GPT_OSS_ALPHA)
_LIMIT: tl.constexpr = tl.constexpr(activation.GPT_OSS_LIMIT)


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
        capped, shifted = tl.where(gate > _LIMIT, _LIMIT, gate), _clamp(up) + 1
        return capped * tl.sigmoid(_ALPHA * capped) * shifted
    elif GATED:
        return _function(gate, ACT)[0] * up
    else:
        return _function(up, ACT)[0]


@triton.jit
def act_slopes(gate, up, ACT: tl.constexpr, GATED: tl.constexpr):
    """The derivatives of ``act`` in gate and up. A clamped value passes no gradient; at the limit itself it does."""
    if ACT == "gpt_oss":
        capped, shifted = tl.where(gate > _LIMIT, _LIMIT, gate), _clamp(up) + 1
        s = tl.sigmoid(_ALPHA * capped)
        slope = tl.where(gate > _LIMIT, 0.0, s * (1 + _ALPHA * capped * (1 - s)))
        return shifted * slope, tl.where(tl.abs(up) > _LIMIT, 0.0, capped * s)
    elif GATED:
        f, slope = _function(gate, ACT)
        return up * slope, f
    else:
        slope = _function(up, ACT)[1]
        return slope, slope


@triton.jit
def _clamp(up):
    return tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
