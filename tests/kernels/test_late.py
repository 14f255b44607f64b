"""Gradients of matrices that come later are those that backward would have computed, and need no weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_kernels import late_weight_gradients, linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.late_cases import check, experts


def a_linear(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[list[Tensor], Callable[..., Tensor]]:
    tensors = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    return [t.to(dtype) for t in tensors], linear


LINEAR = {
    "a linear layer": lambda: a_linear(7, 5, 3, torch.float64),
    "of compiled products": lambda: a_linear(512, 128, 128, torch.float32),
    "bfloat16": lambda: a_linear(512, 128, 128, torch.bfloat16),
}
EXPERTS = {
    "experts, one by one": lambda: experts("cpu", torch.float64, torch.float64),
    "compiled": lambda: experts("cpu", torch.float32, torch.float32),
    "summed for each token": lambda: experts("cpu", torch.float32, torch.float32, per_token=True),
    "wide parameters": lambda: experts("cpu", torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("name", LINEAR)
def test_of_a_linear_layer(name: str) -> None:
    check(*LINEAR[name](), {1})


@pytest.mark.parametrize("name", EXPERTS)
def test_of_experts(name: str) -> None:
    check(*EXPERTS[name](), {1, 2})


def test_of_experts_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose products in bfloat16 are of more rows than an expert has."""
    monkeypatch.setattr("moe_kernels.cpu.native_obstacle", lambda dtype: "no compiler")
    for parameters in (torch.bfloat16, torch.float32):
        check(*experts("cpu", torch.bfloat16, parameters), {1, 2})


def test_they_go_on_to_what_the_weights_are_made_of() -> None:
    """A part of a matrix, as tensor parallel ranks use one; two micro-batches are added up."""
    whole, x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    waiting: list[Callable[[], None]] = []
    for _ in range(2):
        with late_weight_gradients(waiting):
            linear(x, whole[2:5]).sum().backward()
    assert whole.grad is None
    for work in waiting:
        work()
    expected = torch.zeros_like(whole)
    expected[2:5] = 2 * x.sum(0)
    torch.testing.assert_close(whole.grad, expected)


def test_a_block_is_computed_again_once() -> None:
    """And backward through it leaves what comes later."""
    x, (up, down) = (
        torch.randn(3, 4, requires_grad=True),
        (torch.randn(n, requires_grad=True) for n in ((5, 4), (4, 5))),
    )
    runs, waiting = [], []

    def block(x: Tensor) -> Tensor:
        runs.append(x)
        return linear(linear(x, up).relu(), down)

    with late_weight_gradients(waiting):
        checkpoint(block, x, use_reentrant=False).square().sum().backward()
        for work in waiting:
            work()
    assert len(runs) == 2
    expected = torch.autograd.grad((linear(linear(x, up).relu(), down)).square().sum(), (x, up, down))
    for t, grad in zip((x, up, down), expected, strict=True):
        torch.testing.assert_close(t.grad, grad)


def test_nothing_is_late_unless_asked_for() -> None:
    """Nor of frozen weights, nor where backward is to compute all."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    waiting: list[Callable[[], None]] = []
    with late_weight_gradients(waiting):
        linear(x, w).sum().backward()
    assert not waiting
    w.requires_grad_()
    for context in (late_weight_gradients(), torch.enable_grad()):
        with context:
            linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, 2 * x.detach().sum(0).expand(5, 4))
