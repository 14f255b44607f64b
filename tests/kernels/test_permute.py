"""Rows in order of expert and back: written out a token at a time, with gradients, and each the other's transpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_kernels import permute, sum_rows, unpermute
from torch import Tensor

from tests.kernels.ops import BACKENDS, compare, normal, run

# T, K, E, D: an expert is left without tokens; more of them than a token's rows are summed at once; no tokens.
SIZES = [(7, 2, 4, 24), (5, 9, 12, 33), (1, 1, 1, 8), (0, 3, 4, 8)]


def routing(T: int, K: int, E: int) -> Tensor:
    """Distinct experts of each token; the last of several stays empty."""
    used = max(K, E - 1)
    return normal(T, used).topk(K).indices


def one_at_a_time(ids_TK: Tensor, E: int) -> list[tuple[int, int]]:
    """(t, k) of each row."""
    T, K = ids_TK.shape
    return [(t, k) for e in range(E) for t in range(T) for k in range(K) if ids_TK[t, k] == e]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_are_grouped_by_expert_in_order_of_token(size: tuple[int, int, int, int], backend: str) -> None:
    T, K, E, D = size
    ids_TK, x_TD = routing(T, K, E), normal(T, D).float()
    rows_RD, counts_e, row_TK = permute(x_TD, ids_TK, E, backend=backend)
    order = one_at_a_time(ids_TK, E)
    assert torch.equal(rows_RD, torch.stack([x_TD[t] for t, _ in order]) if order else x_TD)
    assert counts_e.tolist() == [int((ids_TK == e).sum()) for e in range(E)]
    assert [int(row_TK[t, k]) for t, k in order] == list(range(T * K))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_there_and_back(size: tuple[int, int, int, int], weighted: bool, backend: str) -> None:
    """Each row is scaled by its number on the way: values and gradients are those of a loop over tokens in float64."""
    T, K, E, D = size
    ids_TK = routing(T, K, E)
    order = one_at_a_time(ids_TK, E)
    inputs = {"x_TD": normal(T, D)} | ({"weights_TK": normal(T, K)} if weighted else {})

    def op(x_TD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        rows_RD, _, row_TK = permute(x_TD, ids_TK, E, backend=backend)
        scale_R1 = torch.arange(1, T * K + 1, dtype=x_TD.dtype)[:, None]
        return unpermute(rows_RD * scale_R1, row_TK, weights_TK, backend=backend)

    def loop(x_TD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        out = [torch.zeros(D, dtype=torch.float64) + 0 * x_TD.sum() for _ in range(T)]
        for r, (t, k) in enumerate(order, start=1):
            out[t] = out[t] + x_TD[t] * r * (1 if weights_TK is None else weights_TK[t, k])
        return torch.stack(out) if out else x_TD + 0 * (0 if weights_TK is None else weights_TK.sum())

    dtype = torch.float64 if backend == "torch" else torch.float32
    compare(run(op, inputs, dtype), run(loop, inputs), 1e-12 if backend == "torch" else 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sizes", [[2, 0, 1, 5, 0, 3], [0, 0], []], ids=str)
def test_tokens_with_any_number_of_rows(sizes: list[int], weighted: bool, backend: str) -> None:
    """A row may be in several sums, and in none; against a loop over tokens in float64."""
    A, start = sum(sizes), torch.tensor([0, *sizes]).cumsum(0)
    y_RD, row_A = normal(7, 33).float(), torch.randint(0, 7, (A,), generator=torch.Generator().manual_seed(2))
    weight_A = normal(A).float() if weighted else None
    out_TD = sum_rows(y_RD, row_A, start, weight_A, backend=backend)
    want = torch.zeros(len(sizes), 33, dtype=torch.float64)
    for t in range(len(sizes)):
        for a in range(int(start[t]), int(start[t + 1])):
            want[t] += y_RD[row_A[a]].double() * (1 if weight_A is None else weight_A[a])
    compare({"out": out_TD.double()}, {"out": want}, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_rows_with_float32_weights(backend: str) -> None:
    """Gradients of weights stay float32; a rounding of the weights is all that torch's path adds."""
    ids_TK, y, weights_TK = routing(40, 4, 8), normal(160, 32, dtype=torch.bfloat16), normal(40, 4).float()
    _, _, row_TK = permute(torch.zeros(40, 1), ids_TK, 8)
    y_RD, w_TK = y.bfloat16().requires_grad_(), weights_TK.clone().requires_grad_()
    out_TD = unpermute(y_RD, row_TK, w_TK, backend=backend)
    g_TD = normal(40, 32, seed=1, dtype=torch.bfloat16)
    dy_RD, dw_TK = torch.autograd.grad(out_TD, (y_RD, w_TK), g_TD.bfloat16())
    assert (out_TD.dtype, dy_RD.dtype, dw_TK.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    want = (y[row_TK] * weights_TK.double()[..., None]).sum(1)
    assert (out_TD.double() - want).norm() < 0.01 * want.norm()
    dots = (y[row_TK] * g_TD[:, None]).sum(-1)
    assert (dw_TK.double() - dots).norm() < 0.005 * dots.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again_and_one_graph_under_compile(backend: str) -> None:
    ids_TK = routing(20, 3, 6)

    def op(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        rows_RD, _, row_TK = permute(x_TD, ids_TK, 6, backend=backend)
        return unpermute(rows_RD.square(), row_TK, weights_TK, backend=backend)

    inputs = {"x_TD": normal(20, 16), "weights_TK": normal(20, 3)}
    first, again = (run(op, inputs, torch.float32) for _ in range(2))
    whole = run(torch.compile(op, backend="aot_eager", fullgraph=True), inputs, torch.float32)
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], whole[name]) for name in first)


def test_keeps_no_rows() -> None:
    """Without weights nothing of rows is kept for backward, but where they come from and go to."""
    kept: list[Tensor] = []
    x_TD = normal(6, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        rows_RD, _, row_TK = permute(x_TD, routing(6, 2, 4), 4)
        unpermute(rows_RD, row_TK)
    assert kept and all(torch.equal(t, row_TK) for t in kept)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda x, ids: permute(x, ids, 3), "ids go from 0 to 3, but the experts are 0 to 2"),
        (lambda x, ids: permute(x, ids.int(), 4), "ids are int64, not torch.int32"),
        (lambda x, ids: permute(x[1:], ids, 4), r"x is \(T, D\) and ids \(T, K\), K > 0, not \(3, 8\) and \(4, 1\)"),
        (lambda x, ids: unpermute(x[1:], ids), r"y is \(T K, D\), .* not \(3, 8\), \(4, 1\) and \(4, 1\)"),
        (lambda x, ids: unpermute(x, ids, torch.ones(4)), r"not \(4, 8\), \(4, 1\) and \(4,\)"),
        (lambda x, ids: permute(x, ids, 4, backend="cpu"), "permute has no backend 'cpu'"),
        (lambda x, ids: sum_rows(x, ids, ids[0]), r"start \(T \+ 1,\), not \(4, 8\), \(4, 1\) and \(1,\)"),
    ],
)
def test_inputs_that_do_not_fit(call: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        call(torch.zeros(4, 8), torch.arange(4)[:, None])
    assert "\n" not in str(error.value)
