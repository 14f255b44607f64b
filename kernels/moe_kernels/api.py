"""The signatures that every backend shares, their checks, and the choice of backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.checks import autocasts, check_counts
from moe_kernels.cpu import cpu_expert_mlp
from moe_kernels.fastest import fastest
from moe_kernels.fp8_experts import fp8_expert_mlp
from moe_kernels.gpu.available import triton_obstacle
from moe_kernels.grouped import grouped_expert_mlp, grouped_mm_obstacle
from moe_kernels.operands import Operands, Setting
from moe_kernels.packages import PACKAGES
from moe_kernels.permutation import check_ids, order_by_expert
from moe_kernels.reference import loop_expert_mlp


def _cpu_obstacle(s: Setting) -> str | None:
    # on meta: its shapes, for a dry run
    return None if s.device.type in ("cpu", "meta") else f"it is for the CPU, and this is {s.device.type}"


def _triton(operands: Operands) -> Tensor:
    from moe_kernels.gpu.experts import triton_expert_mlp  # needs triton

    return triton_expert_mlp(operands)


def _triton_fp8(operands: Operands) -> Tensor:
    from moe_kernels.gpu.fp8_experts import triton_fp8_expert_mlp  # needs triton

    return triton_fp8_expert_mlp(operands)


class _Path(NamedTuple):
    """obstacle: why it cannot run, or None where it can."""

    obstacle: Callable[[Setting], str | None]
    run: Callable[[Operands], Tensor]


_PATHS = {
    "loop": _Path(lambda s: None, loop_expert_mlp),
    "grouped_mm": _Path(lambda s: grouped_mm_obstacle(s.device, s.dtype, s.dim, s.expert_dim), grouped_expert_mlp),
    "cpu": _Path(_cpu_obstacle, cpu_expert_mlp),
    "triton": _Path(lambda s: triton_obstacle(s.device, s.dtype), _triton),
    **{name: _Path(package.obstacle, package.expert_mlp) for name, package in PACKAGES.items()},
}
_FP8_PATHS: dict[str, Callable[[Operands], Tensor]] = {"cpu": fp8_expert_mlp, "triton": _triton_fp8}
BACKENDS = ("auto", "fastest", *_PATHS)


def choose_backend(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    dim: int,
    expert_dim: int,
    activation: str = "swiglu",
    bias: bool = False,
    fp8: bool = False,
) -> tuple[str, str]:
    """(name, why) of the expert kernels that run for ``backend`` ("auto" or a name) on experts of width ``expert_dim``
    in a model of width ``dim``. "auto" takes "cpu" on the CPU and on a GPU "triton", in float32 torch's; no package's.
    "fastest" stays "fastest", which tries all that can run on the first rows of a kind (``moe_kernels.fastest``).

    Raises:
        ValueError: the backend is unknown, or was forced and cannot run here.
    """
    return _choose(backend, Setting(torch.device(device), dtype, dim, expert_dim, activation, bias, fp8))


def _choose(backend: str, s: Setting) -> tuple[str, str]:
    if backend not in BACKENDS:
        raise ValueError(f"no expert backend is called {backend!r}; known: {', '.join(BACKENDS)}")
    if s.fp8:
        return _choose_fp8(backend, s)
    if backend == "fastest":
        return backend, "the backends are timed at the first rows of a kind"
    if backend != "auto":
        if (reason := _PATHS[backend].obstacle(s)) is not None:
            raise ValueError(f"expert backend {backend!r} cannot run: {reason}; use 'auto' or 'loop'")
        return backend, "asked for"
    if s.device.type == "cpu":
        return "cpu", "the experts are on the CPU"
    if s.device.type == "cuda" and s.dtype != torch.float32 and _PATHS["triton"].obstacle(s) is None:
        return "triton", "the fastest where it was timed (docs/gpu-results.md)"
    if (reason := _PATHS["grouped_mm"].obstacle(s)) is not None:
        return "loop", reason
    return "grouped_mm", f"torch's grouped_mm runs on {s.device.type} in {str(s.dtype).removeprefix('torch.')}"


def _choose_fp8(backend: str, s: Setting) -> tuple[str, str]:
    device, dtype = s.device, s.dtype
    name, why = backend, "asked for"
    if backend == "auto":
        on_cpu = device.type == "cpu"
        name, why = ("cpu", "it emulates FP8 on the CPU") if on_cpu else ("triton", "it alone has FP8 on a GPU")
    if name not in _FP8_PATHS:
        raise ValueError(f"expert backend {name!r} has no FP8; use 'auto', 'cpu' or 'triton', or do without FP8")
    if dtype == torch.float64:
        raise ValueError("experts in FP8 take bfloat16, float16 or float32, not float64; use one of them")
    if name == "cpu" and device.type not in ("cpu", "meta"):
        raise ValueError(f"expert backend 'cpu' cannot run on {device.type}; use 'auto'")
    if name == "triton" and (reason := triton_obstacle(device, dtype, fp8=True)) is not None:
        raise ValueError(f"experts in FP8 cannot run in Triton: {reason}; do without FP8")
    return name, why


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
    row_TK: Tensor | None = None,
    activation: str = "swiglu",
    backend: str = "auto",
    fp8: bool = False,
) -> Tensor:
    """MLPs of e experts, each on its own rows: y_r = weight_r * (W2 act(W13 x_r + b13) + b2). y_RD (R, D).

    x_ND: (N, D). Row r is ``x_ND[index_R[r]]``, or ``x_ND[r]`` without index_R (then N = R). Grouped by expert.
    counts: rows of each expert, in order; they sum to R. Zeros are legal, and so is R = 0: every parameter still takes
        part in the graph, with a gradient of zeros. A tensor of integers (e,) may be given instead, on x's device; on a
        GPU the paths "triton", where rows past their sum give zeros, and "grouped_mm", where these are not defined,
        then never wait, nor check their sum.
    w13: (e, n, F, D); n = 2 for gated activations, the gate's weights then up's, and 1 for plain ones. w2: (e, D, F).
    b13: (e, n, F) or None. b2: (e, D) or None.
    Parameters share one dtype: that of x, or float32 under a half-precision x. Then they are rounded to x's where they
        are used, without a copy of all of them, and their gradients are float32.
    index_R: int64 (R,) or None. weight_R: float (R,), any float dtype, or None for 1.
    row_TK: int64 (N, K), R = N K: the rows of each token, where all have equally many, as ``permute`` gives it. The
        result is then out_ND (N, D), the sum of each token's rows, and no gradient of every row is written for it.
        Needs index_R, which names the token of each row.
    activation: gated "swiglu", "geglu", "reglu", "gpt_oss", "swiglu_clamped"; plain "gelu", "relu2"
        (``activation.ACTIVATIONS``).
    backend: one of ``BACKENDS``.
    fp8: all products in FP8 as DeepSeek-V3 makes them (``moe_kernels.fp8_experts``): "triton" on a GPU of compute
        capability 9.0 or later, emulated by "cpu". Not float64.

    Computed in these dtypes under torch.autocast too. Differentiable once in x, w13, w2, b13, b2 and weight_R.
    Deterministic. All paths agree up to rounding; with fp8 numbers are rounded to 4 bits, and gradients are what these
    products give.

    Raises:
        ValueError: shapes, dtypes, devices or counts do not fit; the backend is unknown or cannot run here.
        IndexError: index_R names a row that x does not have. Not looked at on a GPU.
    """
    return _run(Operands(x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation, row_TK), backend, fp8)


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
    fp8: bool = False,
) -> Tensor:
    """A layer of routed experts that are all here: out_t = sum over k of weights_tk * expert_{ids_tk}(x_t). (T, D).

    x_TD: (T, D). ids_TK: int64 (T, K), each token's experts, from 0 to e - 1; not checked on a GPU, to save a wait.
    weights_TK: float (T, K), any float dtype. Parameters, activation, backend, fp8: as in ``expert_mlp``.

    Backward keeps x and the pre-activations: in half precision 2 T D + 4 T K F bytes for gated experts, beside the
    routing (SonicMoE, arXiv 2512.14080). In the paths "cpu" and "triton" no gathered copy of x or of a gradient is
    written. With fp8 x is kept as its E4M3 numbers and their scales: T (D + 4 ceil(D / 128)) bytes instead of 2 T D.
    Differentiable once in x, weights and parameters. Deterministic.

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
    return _run(Operands(x_TD, counts_e, w13, w2, token_R, weight_R, b13, b2, activation, row_TK), backend, fp8)


def _run(o: Operands, backend: str, fp8: bool) -> Tensor:
    """Check, choose and call."""
    if autocasts(o.x_ND.device):
        with torch.autocast(o.x_ND.device.type, enabled=False):
            return _run(o, backend, fp8)
    name, _ = _choose(backend, o.setting._replace(fp8=fp8))
    if isinstance(o.counts, Tensor):
        check_counts(o.counts, len(o.w13), 0)
        stay = name == "triton" or (name == "grouped_mm" and o.counts.device.type != "cpu")
        o = o if stay else o._replace(counts=o.row_counts)
    o.check()
    if fp8:
        return _FP8_PATHS[name](o)
    if name == "fastest":
        able = [name for name, path in _PATHS.items() if path.obstacle(o.setting) is None]
        name = fastest(o, {name: functools.partial(_call, name) for name in able})
    return _call(name, o)


def _call(name: str, o: Operands) -> Tensor:
    return _PATHS[name].run(o if name in ("cpu", "triton") else o.in_one_dtype())  # these round parameters themselves
