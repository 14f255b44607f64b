"""A dense layer: torch's, or on CPU the compiled products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.native.dense import native_linear, takes_native
from moe_kernels.native.library import widens_halves


def linear(x: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y = x W^T + b, as ``torch.nn.functional.linear``: x (..., K), w_NK (N, K), bias_N (N,) or None; (..., N).

    Large products in float32 on CPU go through the compiled kernels, once differentiable; all others, and those that
    torch.compile sees or torch.autocast casts, through torch, which also says what does not fit. (In bfloat16 torch's
    are as fast, where the processor has fast products of it; where it has not, the compiled kernels take these too.)
    """
    fits = w_NK.dim() == 2 and x.shape[-1:] == w_NK.shape[1:]
    fits = fits and (
        bias_N is None or (bias_N.dtype == x.dtype and bias_N.device == x.device and bias_N.shape == w_NK.shape[:1])
    )
    fits = fits and takes_native(x, w_NK, x.numel() // max(w_NK.shape[1], 1))
    fits = fits and not torch.is_autocast_enabled("cpu")
    if fits and (x.dtype == torch.float32 or widens_halves()):
        return native_linear(x, w_NK, bias_N)
    return F.linear(x, w_NK, bias_N)
