"""The signatures that every backend shares, their checks, and the choice of backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.cpu import cpu_expert_mlp
from moe_kernels.fastest import fastest
from moe_kernels.gpu.available import triton_obstacle
from moe_kernels.grouped import grouped_expert_mlp, grouped_mm_obstacle
from moe_kernels.operands import Operands, Setting
from moe_kernels.packages import PACKAGES
from moe_kernels.reference import loop_expert_mlp


def _cpu_obstacle(s: Setting) -> str | None:
    # on meta: its shapes, for a dry run
    return None if s.device.type in ("cpu", "meta") else f"it is for the CPU, and this is {s.device.type}"


def _triton(operands: Operands) -> Tensor:
    from moe_kernels.gpu.experts import triton_expert_mlp  # needs triton

    return triton_expert_mlp(operands)


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
BACKENDS = ("auto", "fastest", *_PATHS)


def choose_backend(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    dim: int,
    expert_dim: int,
    activation: str = "swiglu",
    bias: bool = False,
) -> tuple[str, str]:
    """(name, why) of the expert kernels that run for ``backend`` ("auto" or a name) on experts of width ``expert_dim``
    in a model of width ``dim``. "auto" takes neither "triton" nor a package's as long as nobody has timed it on a GPU;
    "fastest" stays "fastest", which tries all that can run on the first rows of a kind (``moe_kernels.fastest``).

    Raises:
        ValueError: the backend is unknown, or was forced and cannot run here.
    """
    return _choose(backend, Setting(torch.device(device), dtype, dim, expert_dim, activation, bias))


def _choose(backend: str, s: Setting) -> tuple[str, str]:
    if backend not in BACKENDS:
        raise ValueError(f"no expert backend is called {backend!r}; known: {', '.join(BACKENDS)}")
    if backend == "fastest":
        return backend, "the backends are timed at the first rows of a kind"
    if backend != "auto":
        if (reason := _PATHS[backend].obstacle(s)) is not None:
            raise ValueError(f"expert backend {backend!r} cannot run: {reason}; use 'auto' or 'loop'")
        return backend, "asked for"
    if s.device.type == "cpu":
        return "cpu", "the experts are on the CPU"
    if (reason := _PATHS["grouped_mm"].obstacle(s)) is not None:
        return "loop", reason
    return "grouped_mm", f"torch's grouped_mm runs on {s.device.type} in {str(s.dtype).removeprefix('torch.')}"


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
    activation: gated "swiglu", "geglu", "reglu", "gpt_oss"; plain "gelu", "relu2" (``activation.ACTIVATIONS``).
    backend: one of ``BACKENDS``.

    Differentiable once in x, w13, w2, b13, b2 and weight_R. Deterministic. All paths agree up to rounding.

    Raises:
        ValueError: shapes, dtypes or counts do not fit; the backend is unknown or cannot run here.
    """
    return _run(Operands(x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation), backend)


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
    if ids_TK.dtype != torch.int64:
        raise ValueError(f"ids are int64, not {ids_TK.dtype}")
    e = len(w13)
    checked = ids_TK.device.type == "cpu" and ids_TK.numel() and not torch.compiler.is_compiling()
    if checked and not 0 <= ids_TK.min() <= ids_TK.max() < e:
        raise ValueError(f"ids go from {ids_TK.min()} to {ids_TK.max()}, but the experts are 0 to {e - 1}")
    id_R, assignment_R = ids_TK.flatten().sort(stable=True)
    steps = torch.arange(max(e, len(id_R)), device=id_R.device)
    counts_e = torch.searchsorted(id_R, steps[:e], right=True).diff(prepend=steps.new_zeros(1))
    row_TK = torch.empty_like(id_R).scatter_(0, assignment_R, steps[: len(id_R)]).view_as(ids_TK)
    weight_R = weights_TK.flatten().gather(0, assignment_R)
    token_R = assignment_R // ids_TK.shape[1]
    return _run(Operands(x_TD, counts_e, w13, w2, token_R, weight_R, b13, b2, activation, row_TK), backend)


def _run(o: Operands, backend: str) -> Tensor:
    """Check, choose and call."""
    name, _ = _choose(backend, o.setting)
    if isinstance(o.counts, Tensor):
        if o.counts.dim() != 1 or o.counts.is_floating_point():
            raise ValueError(f"counts must be integers (e,), not {o.counts.dtype} of shape {tuple(o.counts.shape)}")
        o = o if name == "triton" else o._replace(counts=o.row_counts)
    o.check()
    if name == "fastest":
        able = [name for name, path in _PATHS.items() if path.obstacle(o.setting) is None]
        name = fastest(o, {name: functools.partial(_call, name) for name in able})
    return _call(name, o)


def _call(name: str, o: Operands) -> Tensor:
    return _PATHS[name].run(o if name == "cpu" else o.in_one_dtype())  # the CPU's rounds wider parameters by itself
