"""The signatures that every backend shares, their checks, and the choice of backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.cpu import cpu_expert_mlp
from moe_kernels.gpu.available import triton_obstacle
from moe_kernels.grouped import grouped_expert_mlp, grouped_mm_obstacle
from moe_kernels.permutation import check_ids, order_by_expert, unpermute
from moe_kernels.reference import loop_expert_mlp


def _triton(*inputs: Any) -> Tensor:
    from moe_kernels.gpu.experts import triton_expert_mlp  # needs triton

    return triton_expert_mlp(*inputs)


_PATHS: dict[str, Callable[..., Tensor]] = {
    "loop": loop_expert_mlp,
    "grouped_mm": grouped_expert_mlp,
    "cpu": cpu_expert_mlp,
    "triton": _triton,
}
BACKENDS = ("auto", *_PATHS)


def choose_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype, dim: int, expert_dim: int
) -> tuple[str, str]:
    """(name, why) of the expert kernels that run for ``backend`` ("auto" or a name) on experts of width ``expert_dim``
    in a model of width ``dim``. "auto" does not take "triton" as long as nobody has timed it on a GPU.

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
    if backend == "triton" and (reason := triton_obstacle(device, dtype)) is not None:
        raise ValueError(f"expert backend 'triton' cannot run: {reason}; use 'auto' or 'loop'")
    if backend != "auto":
        return backend, "asked for"
    if device.type == "cpu":
        return "cpu", "the experts are on the CPU"
    if obstacle is None:
        return "grouped_mm", f"torch's grouped_mm runs on {device.type} in {str(dtype).removeprefix('torch.')}"
    return "loop", obstacle


def expert_mlp(
    x_ND: Tensor,
    counts: list[int] | Tensor,
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
        part in the graph, with a gradient of zeros. A tensor of integers (e,) may be given instead, on x's device; the
        Triton path then never waits for the GPU, nor checks their sum: rows past it give zeros.
    w13: (e, n, F, D); n = 2 for gated activations, the gate's weights then up's, and 1 for plain ones. w2: (e, D, F).
    b13: (e, n, F) or None. b2: (e, D) or None.
    Parameters share one dtype: that of x, or float32 under a half-precision x. Then they are rounded to x's where they
        are used, without a copy of all of them, and their gradients are float32.
    index_R: int64 (R,) or None. weight_R: float (R,), any float dtype, or None for 1.
    activation: gated "swiglu", "geglu", "reglu", "gpt_oss", "swiglu_clamped"; plain "gelu", "relu2"
        (``activation.ACTIVATIONS``).
    backend: one of ``BACKENDS``.

    Differentiable once in x, w13, w2, b13, b2 and weight_R. Deterministic. All paths agree up to rounding.

    Raises:
        ValueError: shapes, dtypes or counts do not fit; the backend is unknown or cannot run here.
    """
    return _run(x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation, None, backend)


def moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    backend: str = "auto",
) -> Tensor:
    """A layer of routed experts that are all here: out_t = sum over k of weights_tk * expert_{ids_tk}(x_t). (T, D).

    x_TD: (T, D). ids_TK: int64 (T, K), each token's experts, from 0 to e - 1; not checked on a GPU, to save a wait.
    weights_TK: float (T, K), any float dtype. Parameters, activation, backend: as in ``expert_mlp``.

    Backward keeps x and the pre-activations: in half precision 2 T D + 4 T K F bytes for gated experts, beside the
    routing (SonicMoE, arXiv 2512.14080). In the paths "cpu" and "triton" no gathered copy of x or of a gradient is
    written. Differentiable once in x, weights and parameters. Deterministic.

    Raises:
        ValueError: as ``expert_mlp``; ids or weights do not fit.
    """
    if ids_TK.dim() != 2 or ids_TK.shape[1] == 0 or ids_TK.shape != weights_TK.shape or len(ids_TK) != len(x_TD):
        shapes = f"{tuple(ids_TK.shape)}, {tuple(weights_TK.shape)} and {tuple(x_TD.shape)}"
        raise ValueError(f"ids and weights are (T, K), K > 0, and x (T, D), not {shapes}")
    check_ids(ids_TK, len(w13))
    counts_e, row_TK, assignment_R = order_by_expert(ids_TK, len(w13))
    weight_R = weights_TK.flatten().gather(0, assignment_R)
    token_R = assignment_R // ids_TK.shape[1]
    return _run(x_TD, counts_e, w13, w2, token_R, weight_R, b13, b2, activation, row_TK, backend)


def _run(
    x_ND: Tensor,
    counts: list[int] | Tensor,
    w13: Tensor,
    w2: Tensor,
    index_R: Tensor | None,
    weight_R: Tensor | None,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: str,
    row_TK: Tensor | None,
    backend: str,
) -> Tensor:
    """Check, choose and call; with row_TK the sum of each token's rows."""
    name, _ = choose_backend(backend, x_ND.device, x_ND.dtype, w13.shape[-1], w2.shape[-1])
    if isinstance(counts, Tensor):
        if counts.dim() != 1 or counts.is_floating_point():
            raise ValueError(f"counts must be integers (e,), not {counts.dtype} of shape {tuple(counts.shape)}")
        counts = counts if name == "triton" else counts.tolist()
    _check(x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation)
    if name != "cpu":  # which rounds wider parameters by itself
        w13, w2 = w13.to(x_ND.dtype), w2.to(x_ND.dtype)
        b13, b2 = (None if b is None else b.to(x_ND.dtype) for b in (b13, b2))
    inputs = (x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation)
    if name in ("cpu", "triton"):
        return _PATHS[name](*inputs, row_TK)
    y_RD = _PATHS[name](*inputs)
    return y_RD if row_TK is None else unpermute(y_RD, row_TK)


def _check(
    x_ND: Tensor,
    counts: list[int] | Tensor,
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
    if isinstance(counts, Tensor):
        if len(counts) != e:
            raise ValueError(f"counts must be {e} row numbers, not {len(counts)}")
    elif len(counts) != e or any(count < 0 for count in counts) or sum(counts) != R:
        raise ValueError(f"counts must be {e} row numbers that sum to {R}, not {len(counts)} that sum to {sum(counts)}")
