"""The signature that every backend shares, its checks, and the choice of backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.cpu import cpu_expert_mlp
from moe_kernels.grouped import grouped_expert_mlp, grouped_mm_obstacle
from moe_kernels.reference import loop_expert_mlp

_PATHS: dict[str, Callable[..., Tensor]] = {
    "loop": loop_expert_mlp,
    "grouped_mm": grouped_expert_mlp,
    "cpu": cpu_expert_mlp,
}
BACKENDS = ("auto", *_PATHS)


def choose_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype, dim: int, expert_dim: int
) -> tuple[str, str]:
    """(name, why) of the expert kernels that run for ``backend`` ("auto" or a name) on experts of width ``expert_dim``
    in a model of width ``dim``.

    Raises:
        ValueError: the backend is unknown, or was forced and cannot run here.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise ValueError(f"no expert backend is called {backend!r}; known: {', '.join(BACKENDS)}")
    obstacle = grouped_mm_obstacle(device, dtype, dim, expert_dim)
    if backend == "grouped_mm" and obstacle is not None:
        raise ValueError(f"expert backend 'grouped_mm' cannot run: {obstacle}; use 'auto' or 'loop'")
    if backend == "cpu" and device.type not in ("cpu", "meta"):  # on meta: its shapes, for a dry run
        raise ValueError(f"expert backend 'cpu' cannot run on {device.type}; use 'auto' or 'loop'")
    if backend != "auto":
        return backend, "asked for"
    if device.type == "cpu":
        return "cpu", "the experts are on the CPU"
    if obstacle is None:
        return "grouped_mm", f"torch's grouped_mm runs on {device.type} in {str(dtype).removeprefix('torch.')}"
    return "loop", obstacle


def expert_mlp(
    x_ND: Tensor,
    counts: list[int],
    w13: Tensor,
    w2: Tensor,
    *,
    index_R: Tensor | None = None,
    weight_R: Tensor | None = None,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    backend: str = "auto",
) -> Tensor:
    """MLPs of e experts, each on its own rows: y_r = weight_r * (W2 act(W13 x_r + b13) + b2). y_RD (R, D).

    x_ND: (N, D). Row r is ``x_ND[index_R[r]]``, or ``x_ND[r]`` without index_R (then N = R). Grouped by expert.
    counts: rows of each expert, in order; they sum to R. Zeros are legal, and so is R = 0: every parameter still takes
        part in the graph, with a gradient of zeros.
    w13: (e, n, F, D); n = 2 for gated activations, the gate's weights then up's, and 1 for plain ones. w2: (e, D, F).
    b13: (e, n, F) or None. b2: (e, D) or None.
    Parameters share one dtype: that of x, or float32 under a half-precision x. Then they are rounded to x's where they
        are used, without a copy of all of them, and their gradients are float32.
    index_R: int64 (R,) or None. weight_R: float (R,), any float dtype, or None for 1.
    activation: gated "swiglu", "geglu", "reglu", "gpt_oss"; plain "gelu", "relu2" (``activation.ACTIVATIONS``).
    backend: one of ``BACKENDS``.

    Differentiable once in x, w13, w2, b13, b2 and weight_R. Deterministic. All paths agree up to rounding.

    Raises:
        ValueError: shapes, dtypes or counts do not fit; the backend is unknown or cannot run here.
    """
    _check(x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation)
    name, _ = choose_backend(backend, x_ND.device, x_ND.dtype, w13.shape[3], w13.shape[2])
    if name != "cpu":  # which rounds wider parameters by itself
        w13, w2 = w13.to(x_ND.dtype), w2.to(x_ND.dtype)
        b13, b2 = (None if b is None else b.to(x_ND.dtype) for b in (b13, b2))
    return _PATHS[name](x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation)


def _check(
    x_ND: Tensor,
    counts: list[int],
    w13: Tensor,
    w2: Tensor,
    index_R: Tensor | None,
    weight_R: Tensor | None,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation is called {activation!r}; known: {', '.join(ACTIVATIONS)}")
    n = ACTIVATIONS[activation].matrices
    if x_ND.dim() != 2 or w13.dim() != 4 or w13.shape[1] != n:
        shapes = f"{tuple(x_ND.shape)} and {tuple(w13.shape)}"
        raise ValueError(f"with {activation} x is (N, D) and w13 (e, {n}, F, D), not {shapes}")
    R = x_ND.shape[0] if index_R is None else index_R.shape[0]
    e, _, F, D = w13.shape
    expected = (
        ("x", x_ND, (x_ND.shape[0], D)),
        ("w2", w2, (e, D, F)),
        ("index_R", index_R, (R,)),
        ("weight_R", weight_R, (R,)),
        ("b13", b13, (e, n, F)),
        ("b2", b2, (e, D)),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} where w13 {tuple(w13.shape)} needs {shape}")
    half = x_ND.dtype in (torch.bfloat16, torch.float16)
    if w13.dtype != x_ND.dtype and not (half and w13.dtype == torch.float32):
        raise ValueError(f"w13 is {w13.dtype} but x is {x_ND.dtype}; the experts need one dtype, or float32 parameters")
    for name, tensor in (("w2", w2), ("b13", b13), ("b2", b2)):
        if tensor is not None and tensor.dtype != w13.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but w13 is {w13.dtype}; parameters need one dtype")
    if len(counts) != e or any(count < 0 for count in counts) or sum(counts) != R:
        raise ValueError(f"counts must be {e} row numbers that sum to {R}, not {len(counts)} that sum to {sum(counts)}")
