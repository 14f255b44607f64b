"""Experts and a comparison, for the gradients of matrices that come late."""

from __future__ import annotations

from collections.abc import Callable

import torch
from moe_kernels import expert_mlp, late_weight_gradients
from torch import Tensor


def experts(
    backend: str, dtype: torch.dtype, parameters: torch.dtype, per_token: bool = False
) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Of which one has no rows."""
    counts, tokens = [5, 0, 11], 8
    row_TK = torch.randperm(2 * tokens).view(tokens, 2)
    index_R = torch.empty(2 * tokens, dtype=torch.int64).index_copy_(0, row_TK.flatten(), torch.arange(16) // 2)
    x, w13, w2, weight_R = (torch.randn(s) for s in ((tokens, 16), (3, 2, 8, 16), (3, 16, 8), (2 * tokens,)))

    def run(x: Tensor, w13: Tensor, w2: Tensor, weight_R: Tensor) -> Tensor:
        more = {"row_TK": row_TK} if per_token else {}
        return expert_mlp(x, counts, w13, w2, index_R=index_R, weight_R=weight_R, backend=backend, **more)

    return [x.to(dtype), w13.to(parameters), w2.to(parameters), weight_R.to(dtype)], run


def check(tensors: list[Tensor], run: Callable[..., Tensor], matrices: set[int]) -> None:
    """matrices: which of ``tensors`` get their gradients late."""
    now = [t.clone().requires_grad_() for t in tensors]
    y = run(*now)
    above = torch.randn_like(y)
    y.backward(above)

    later = [t.clone().requires_grad_() for t in tensors]
    waiting: list[Callable[[], None]] = []
    with late_weight_gradients():
        y = run(*later)
    with late_weight_gradients(waiting):
        y.backward(above)
    assert {i for i, t in enumerate(later) if t.grad is None} == matrices
    assert len(waiting) == len(matrices)
    with torch.no_grad():
        for i in matrices:
            later[i].fill_(float("nan"))
    for work in waiting:
        work()
    tolerance = 2e-2 if tensors[0].dtype == torch.bfloat16 else 1e-5
    for one, other in zip(now, later, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance)
