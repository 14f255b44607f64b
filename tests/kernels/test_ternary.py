"""Ternary weights against their definition, written out number by number, and the straight-through gradient."""

from __future__ import annotations

import pytest
import torch
from moe_kernels import absmean, expert_mlp, ternary


def by_hand(matrix: torch.Tensor) -> list[list[float]]:
    """s * clip(round(w / s), -1, 1), s = mean |w|: |w| of half of s or less is 0."""
    rows = matrix.tolist()
    s = sum(abs(w) for row in rows for w in row) / matrix.numel()
    return [[0.0 if abs(w) <= s / 2 else (s if w > 0 else -s) for w in row] for row in rows]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_matrix_has_a_scale_of_its_own(dtype: torch.dtype) -> None:
    w = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[1, 1] *= 100
    w[2, 0] = 0
    out = ternary(w)
    assert out.dtype == dtype and torch.equal(out[2, 0], torch.zeros(5, 7, dtype=dtype))
    for e in range(3):
        for part in range(2):
            want = torch.tensor(by_hand(w[e, part].double()), dtype=torch.float64)
            torch.testing.assert_close(
                out[e, part].double(), want, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=0
            )
            assert out[e, part].abs().unique().numel() <= 2


def test_a_part_of_a_matrix_with_the_scale_of_the_whole_is_a_part_of_the_result() -> None:
    w = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ternary(w[:, :, 2:5], absmean(w)), ternary(w)[:, :, 2:5])


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "cpu"])
def test_gradients_are_those_of_the_rounded_weights(backend: str) -> None:
    """Through every backend that needs no GPU: masters get what autograd gives to the rounded weights."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    x = torch.randn(9, 8, generator=generator, dtype=dtype)
    w13 = torch.randn(3, 2, 8, 8, generator=generator, dtype=dtype, requires_grad=True)
    w2 = torch.randn(3, 8, 8, generator=generator, dtype=dtype, requires_grad=True)
    out = expert_mlp(x, [4, 0, 5], ternary(w13), ternary(w2), backend=backend)
    out.square().sum().backward()
    rounded = [ternary(w).detach().requires_grad_() for w in (w13, w2)]
    reference = expert_mlp(x, [4, 0, 5], *rounded, backend="loop")
    reference.square().sum().backward()
    torch.testing.assert_close(out, reference)
    for master, leaf in zip((w13, w2), rounded, strict=True):
        torch.testing.assert_close(master.grad, leaf.grad)
        assert master.grad is not None and master.grad.abs().sum() > 0
