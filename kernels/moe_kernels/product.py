"""Rows times the matrix of their expert, and both gradients: the product that expert layers are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.checks import autocasts, check_counts, check_one_device
from moe_kernels.gpu.available import triton_obstacle
from moe_kernels.grouped import grouped_mm_obstacle, torch_grouped_mm
from moe_kernels.native import experts as native
from moe_kernels.native.library import native_obstacle


class Passes(NamedTuple):
    """forward(x_RK, w_eNK, counts_e) -> y_RN. input(dy_RN, w, counts_e) -> dx_RK. weights(dy, x, counts_e, w) -> dw."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    input: Callable[[Tensor, Tensor, Tensor], Tensor]
    weights: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


NATIVE = Passes(
    lambda x, w, counts_e: native.rows_times_weights(x, None, w, counts_e, True),
    lambda dy, w, counts_e: native.rows_times_weights(dy, None, w, counts_e, False),
    lambda dy, x, counts_e, w: native.weight_gradient(dy, None, x, None, counts_e, torch.empty_like(w)),
)
PRODUCT_BACKENDS = ("auto", "loop", "grouped_mm", "cpu", "triton")


def grouped_mm(x_RK: Tensor, w_eNK: Tensor, counts: list[int] | Tensor, *, backend: str = "auto") -> Tensor:
    """y_r = W_e x_r for rows grouped by expert: y_RN (R, N), in x's dtype; sums are float32 or wider.

    x_RK: (R, K). w_eNK: (e, N, K), of x's dtype or float32 under a half-precision x. counts: rows of each expert, which
        sum to R; zeros are legal, R = 0 too. Or integers (e,) on x's device: "triton" then never waits for the GPU, nor
        checks their sum; rows past it give zeros.
    backend: one of ``PRODUCT_BACKENDS``. "auto" is "cpu" on the CPU (compiled if that can be, else a loop), elsewhere
        torch's "grouped_mm" where it can, else "loop".

    Differentiable once in x and w: dx_r = W_e^T dy_r, and dW_e = sum over its rows of dy_r x_r^T. Deterministic.

    Raises:
        ValueError: shapes, dtypes, devices or counts do not fit; the backend is unknown or cannot run here.
    """
    if autocasts(x_RK.device):
        with torch.autocast(x_RK.device.type, enabled=False):
            return grouped_mm(x_RK, w_eNK, counts, backend=backend)
    _check(x_RK, w_eNK)
    name = _choose(backend, x_RK, w_eNK)
    check_counts(counts, len(w_eNK), len(x_RK))
    if isinstance(counts, Tensor) and name != "triton":
        counts = counts.tolist()
        check_counts(counts, len(w_eNK), len(x_RK))
    if name == "triton":
        from moe_kernels.gpu.grouped import TRITON  # needs triton

        w_eNK = w_eNK.to(x_RK.dtype)
        return _Product.apply(x_RK, w_eNK, torch.as_tensor(counts, device=x_RK.device), TRITON)
    if name == "cpu" and native_obstacle(x_RK.dtype) is None:
        return _Product.apply(x_RK, w_eNK, torch.as_tensor(counts), NATIVE)
    w_eNK = w_eNK.to(x_RK.dtype)
    if name == "grouped_mm" and len(x_RK):  # torch's backward refuses operands without rows
        offsets_e = torch.as_tensor(counts, device=x_RK.device).cumsum(0).to(torch.int32)
        y_RN = torch_grouped_mm(x_RK.contiguous(), w_eNK, offsets_e)
        if y_RN.requires_grad:
            y_RN.register_hook(Tensor.contiguous)  # its backward refuses expanded gradients
        return y_RN
    parts = zip(x_RK.split(list(counts)), w_eNK.unbind(0), strict=True)
    return torch.cat([F.linear(x_rK, w_NK) for x_rK, w_NK in parts])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, w_eNK: Tensor, counts_e: Tensor, passes: Passes) -> Tensor:
        x_RK, w_eNK = x_RK.contiguous(), w_eNK.contiguous()
        ctx.save_for_backward(x_RK, w_eNK, counts_e)
        ctx.passes = passes
        return passes.forward(x_RK, w_eNK, counts_e)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RK, w_eNK, counts_e = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        dy_RN = grads[0].contiguous()
        dx_RK = ctx.passes.input(dy_RN, w_eNK, counts_e) if need_x else None
        dw_eNK = ctx.passes.weights(dy_RN, x_RK, counts_e, w_eNK) if need_w else None
        return dx_RK, dw_eNK, None, None


def _check(x_RK: Tensor, w_eNK: Tensor) -> None:
    if x_RK.dim() != 2 or w_eNK.dim() != 3 or x_RK.shape[1] != w_eNK.shape[2] or 0 in w_eNK.shape:
        shapes = f"{tuple(x_RK.shape)} and {tuple(w_eNK.shape)}"
        raise ValueError(f"x is (R, K) and w (e, N, K), all but R 1 or more, not {shapes}")
    check_one_device("grouped_mm", x_RK, w_eNK)
    half = x_RK.dtype in (torch.bfloat16, torch.float16)
    if w_eNK.dtype != x_RK.dtype and not (half and w_eNK.dtype == torch.float32):
        raise ValueError(f"w is {w_eNK.dtype} but x is {x_RK.dtype}; a product needs one dtype, or float32 weights")


def _choose(backend: str, x_RK: Tensor, w_eNK: Tensor) -> str:
    if backend not in PRODUCT_BACKENDS:
        raise ValueError(f"grouped_mm has no backend {backend!r}; known: {', '.join(PRODUCT_BACKENDS)}")
    device, dtype = x_RK.device, x_RK.dtype
    obstacle = grouped_mm_obstacle(device, dtype, w_eNK.shape[2], w_eNK.shape[1], ("K", "N"))
    if backend == "auto":
        return "cpu" if device.type == "cpu" else "loop" if obstacle is not None else "grouped_mm"
    if backend == "cpu":
        obstacle = None if device.type == "cpu" else f"it is for the CPU, and this is {device.type}"
    elif backend == "triton":
        obstacle = triton_obstacle(device, dtype)
    if backend != "loop" and obstacle is not None:
        raise ValueError(f"grouped_mm cannot run on backend {backend!r}: {obstacle}; use 'auto' or 'loop'")
    return backend
