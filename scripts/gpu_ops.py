"""The ops beside the expert layer for ``gpu_check.py``: their Triton kernels against torch's operators in float64, and
both timed, forward and backward together, at sizes of the models that use them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_times import seconds
from moe_kernels import linear_cross_entropy, permute, rms_norm, rope, router_topk, sum_rows, unpermute
from torch import Tensor

HALF, FULL = torch.bfloat16, torch.float32
LIMITS = {HALF: 1e-2, FULL: 1e-5}


class Case(NamedTuple):
    """call(backend=, **inputs) on inputs of ``dtype``, which are differentiable."""

    name: str
    dtype: torch.dtype
    call: Callable[..., Tensor]
    inputs: dict[str, Tensor]


def cases(device: str, tiny: bool) -> list[Case]:
    """Norms of a model and of its heads; routers of Qwen3 and DeepSeek-V3; both pairings of rope; rows of 8 experts; a
    vocabulary's loss."""
    T, heads = (5, 2) if tiny else (4096, 16)
    D, E = (24, 16) if tiny else (2048, 256)
    deepseek: dict[str, Any] = {"score": "sigmoid", "groups": 8, "top_groups": 4, "scale": 2.5}
    deepseek["bias_E"] = _normal(device, E).float() / 9

    def norm(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        return rms_norm(x, weight, 1e-6, backend=backend)

    def router(logits_TE: Tensor, backend: str, **options: Any) -> Tensor:
        """Weights of all experts, 0 for those that are not chosen, and below them the loads."""
        weights_TK, ids_TK, counts_E, _ = router_topk(logits_TE, 8, backend=backend, **options)
        dense_TE = weights_TK.new_zeros(logits_TE.shape).scatter(1, ids_TK, weights_TK)
        return torch.cat((dense_TE, counts_E[None].to(dense_TE.dtype)))

    def turned(x: Tensor, backend: str, interleaved: bool) -> Tensor:
        angle = torch.arange(x.shape[1], device=device)[:, None, None] / 3.0 ** torch.arange(16, device=device)
        return rope(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype), interleaved=interleaved, backend=backend)

    def rows(x_TD: Tensor, weights_TK: Tensor, backend: str) -> Tensor:
        ids_TK = torch.arange(weights_TK.numel(), device=device).view_as(weights_TK) * 7 % 32
        rows_RD, _, row_TK = permute(x_TD, ids_TK, 32, backend=backend)
        return unpermute(rows_RD * 2, row_TK, weights_TK, backend=backend)

    def sums(x_RD: Tensor, backend: str) -> Tensor:
        """sum_rows has no gradient of its own: a slice beside it has one."""
        each = torch.arange(len(x_RD) + 1, device=device)
        return x_RD[::8] + sum_rows(x_RD, each[:-1] * 7 % len(x_RD), each[::8], backend=backend)

    def loss(h_TD: Tensor, w_VD: Tensor, backend: str) -> Tensor:
        targets_T = torch.arange(len(h_TD), device=device) % len(w_VD)
        return linear_cross_entropy(h_TD, w_VD, targets_T, reduction="none", backend=backend)

    x_TD, x_BSHd, logits_TE = _normal(device, T, D), _normal(device, 2, T, heads, 64), _normal(device, T, E)
    normed = {"x": x_TD, "weight": _normal(device, D)}
    return [
        Case("rms_norm", HALF, norm, normed),
        Case("rms_norm float32", FULL, norm, normed),
        Case("rms_norm of heads", HALF, norm, {"x": x_BSHd, "weight": _normal(device, 64)}),
        Case("router_topk of Qwen3", FULL, router, {"logits_TE": logits_TE[:, : E // 2]}),
        Case("router_topk of DeepSeek-V3", FULL, functools.partial(router, **deepseek), {"logits_TE": logits_TE}),
        Case("rope", HALF, functools.partial(turned, interleaved=False), {"x": x_BSHd}),
        Case("rope of neighbours", HALF, functools.partial(turned, interleaved=True), {"x": x_BSHd}),
        Case("linear_cross_entropy", HALF, loss, {"h_TD": x_TD, "w_VD": _normal(device, 16 * D, D) / 32}),
        Case("permute and unpermute", HALF, rows, {"x_TD": x_TD, "weights_TK": _normal(device, T, 8)}),
        Case("sum_rows", HALF, sums, {"x_RD": _normal(device, 8 * T, D)}),
    ]


def _normal(device: str, *shape: int) -> Tensor:
    """Float64 numbers that bfloat16 has."""
    g = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, device=device).bfloat16().double()


def op_checks(device: str, tiny: bool = False) -> list[tuple[str, float, Callable[[], float]]]:
    """(name, limit, what computes the error) of each case."""
    return [(case.name, LIMITS[case.dtype], functools.partial(_error, case)) for case in cases(device, tiny)]


def _error(case: Case) -> float:
    """The largest error of the output or a gradient, relative to its norm; 1 where something is NaN or infinite."""
    got, want = run_case(case, case.dtype, "triton"), run_case(case, torch.float64, "torch")
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    return max(error if error < 1 else 1.0 for error in errors)


def run_case(case: Case, dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
    leaves = {name: t.to(dtype).requires_grad_() for name, t in case.inputs.items()}
    y = case.call(**leaves, backend=backend)
    above = torch.arange(1.0, y.numel() + 1, device=y.device).cos().bfloat16().view_as(y).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, list(leaves.values()), above)


def time_ops() -> list[dict[str, Any]]:
    """Milliseconds of forward and backward on the GPU, of both backends."""
    found = []
    for case in cases("cuda", tiny=False):
        row: dict[str, Any] = {"op": case.name}
        leaves = {name: t.to(case.dtype).requires_grad_() for name, t in case.inputs.items()}
        above = torch.ones_like(case.call(**leaves, backend="torch"))

        def both(backend: str, case: Case = case, leaves: dict[str, Tensor] = leaves, above: Tensor = above) -> None:
            torch.autograd.grad(case.call(**leaves, backend=backend), list(leaves.values()), above)

        for backend in ("triton", "torch"):
            row[f"{backend} ms"] = 1e3 * seconds(functools.partial(both, backend), "cuda")
        print(f"{case.name}: triton {row['triton ms']:.3f} ms, torch {row['torch ms']:.3f} ms", flush=True)
        found.append(row)
    return found
