"""Gathering rows and summing them: values against loops, gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from moetrain.moe.permute import RowOrder, gather_rows, order_by_expert, permute, sum_rows

T, E, D = 6, 4, 3
CASES = {
    "dense top-2": (torch.arange(T).repeat_interleave(2), torch.tensor([0, 3, 1, 2, 3, 0, 1, 0, 3, 2, 2, 1])),
    "some tokens without rows": (torch.tensor([0, 0, 0, 2, 5]), torch.tensor([3, 1, 0, 1, 1])),
    "one row": (torch.tensor([4]), torch.tensor([2])),
    "no rows": (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, RowOrder]:
    token_A, expert_A = CASES[request.param]
    return token_A, expert_A, order_by_expert(token_A, expert_A, T)


def test_rows_are_grouped_by_expert_in_token_order(case: tuple[Tensor, Tensor, RowOrder]) -> None:
    token_A, expert_A, order = case
    expected = sorted(range(len(token_A)), key=lambda a: (int(expert_A[a]), a))
    assert order.assignment_R.tolist() == expected
    x = torch.randn(T, D, dtype=torch.float64)
    assert torch.equal(gather_rows(x, order), x[token_A[expected]])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sum_adds_each_tokens_rows(case: tuple[Tensor, Tensor, RowOrder], weighted: bool, dtype: torch.dtype) -> None:
    token_A, _, order = case
    y = torch.randn(len(token_A), D, dtype=dtype)
    weight_A = torch.rand(len(token_A), dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    expected = torch.zeros(T, D, dtype=torch.float64)
    for a, t in enumerate(token_A.tolist()):
        w = 1.0 if weight_A is None else weight_A[a].to(dtype).double()
        expected[t] += w * y[order.row_A[a]].double()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    out = sum_rows(y, order, weight_A)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients(case: tuple[Tensor, Tensor, RowOrder]) -> None:
    token_A, _, order = case
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(token_A), D, dtype=torch.float64, requires_grad=True)
    w = torch.rand(len(token_A), dtype=torch.float64, requires_grad=True)
    if len(token_A):
        assert gradcheck(lambda x: gather_rows(x, order), (x,))
        assert gradcheck(lambda y: sum_rows(y, order), (y,))
        assert gradcheck(lambda y, w: sum_rows(y, order, w), (y, w))
        assert gradcheck(lambda w: permute(w, order.assignment_R, order.row_A), (w,))
    else:
        (gather_rows(x, order).sum() + sum_rows(y, order, w).sum()).backward()
        assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()
        assert y.grad is not None and w.grad is not None


def test_backward_of_many_rows_goes_block_by_block() -> None:
    """More rows than one block holds, against plain indexing."""
    T, K, D = 200, 4, 512
    order = order_by_expert(torch.arange(T).repeat_interleave(K), torch.randint(E, (T * K,)), T)
    y, w, g = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((T * K, D), (T * K,), (T, D)))
    ours = torch.autograd.grad((sum_rows(y, order, w) * g).sum(), (y, w))
    plain = (y[order.row_A].view(T, K, D) * w.view(T, K, 1)).sum(1)
    expected = torch.autograd.grad((plain * g).sum(), (y, w))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
