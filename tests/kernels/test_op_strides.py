"""The ops take tensors as autograd hands them out: gradients that are one number expanded, inputs in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_kernels import permute, rms_norm, rope, router_topk, unpermute
from torch import Tensor

from tests.kernels.ops import BACKENDS, normal

ANGLE = normal(5, 1, 4).float()
IDS_TK = normal(6, 8).topk(3).indices


def there_and_back(x_TD: Tensor, weights_TK: Tensor, backend: str) -> Tensor:
    rows_RD, _, row_TK = permute(x_TD, IDS_TK, 8, backend=backend)
    return unpermute(rows_RD * 2, row_TK, weights_TK, backend=backend)


CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, w, backend: rms_norm(x, w, 1e-5, backend=backend), ((3, 5, 16), (16,))),
    "rope": (lambda x, backend: rope(x, ANGLE.cos(), ANGLE.sin(), interleaved=True, backend=backend), ((2, 5, 3, 10),)),
    "permute": (lambda x, backend: permute(x, IDS_TK, 8, backend=backend)[0], ((6, 16),)),
    "permute and unpermute": (there_and_back, ((6, 16), (6, 3))),
    "router_topk": (lambda x, backend: router_topk(x, 3, backend=backend).weights_TK, ((6, 8),)),
    "its scores": (lambda x, backend: router_topk(x, 3, with_scores=True, backend=backend).scores_TE, ((6, 8),)),
}


def strided(t: Tensor) -> Tensor:
    """The same numbers, the last dimension outermost in memory."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_strides_change_nothing(name: str, backend: str) -> None:
    call, shapes = CASES[name]
    plain = [normal(*shape).float().requires_grad_() for shape in shapes]
    other = [strided(t.detach()).requires_grad_() for t in plain]
    y = call(*plain, backend=backend)
    one = torch.ones(())
    for above in (one.expand_as(y), strided(normal(*y.shape).float())):
        want = torch.autograd.grad(call(*plain, backend=backend), plain, above.contiguous())
        for leaves in (plain, other):
            out = call(*leaves, backend=backend)
            torch.testing.assert_close(out, y, rtol=1e-6, atol=1e-6)
            for got, grad in zip(torch.autograd.grad(out, leaves, above), want, strict=True):
                torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-5)
