"""The grouped product on every backend: values and both gradients against one product per expert in float64."""

from __future__ import annotations

import pytest
import torch
from moe_kernels import PRODUCT_BACKENDS, grouped_mm
from torch import Tensor

from tests.kernels.expert_cases import LOADS

HERE = [name for name in PRODUCT_BACKENDS if name not in ("auto", "triton")]  # triton: test_triton.py
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 0.01}


def inputs(counts: list[int], N: int = 24, K: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """x, w, and the gradient of y."""
    g = torch.Generator().manual_seed(sum(counts))
    shapes = ((sum(counts), K), (len(counts), N, K), (sum(counts), N))
    x, w, dy = (torch.randn(*shape, generator=g).bfloat16().double() for shape in shapes)
    return x, w, dy


def by_definition(x: Tensor, w: Tensor, counts: list[int], dy: Tensor) -> list[Tensor]:
    """y, dx and dw, a row at a time."""
    expert = [e for e, n in enumerate(counts) for _ in range(n)]
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.zeros_like(w)
    for r, e in enumerate(expert):
        y[r], dx[r] = w[e] @ x[r], w[e].T @ dy[r]
        dw[e] += torch.outer(dy[r], x[r])
    return [y, dx, dw]


def check_against_definition(backend: str, counts: list[int], dtype: torch.dtype, parameters: torch.dtype) -> None:
    x, w, dy = inputs(counts)
    leaves = [x.to(dtype).requires_grad_(), w.to(parameters).requires_grad_()]
    y = grouped_mm(*leaves, counts, backend=backend)
    got = [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]
    assert [t.dtype for t in got] == [dtype, dtype, parameters]
    for mine, want in zip(got, by_definition(x, w, counts, dy), strict=True):
        assert (mine.double() - want).norm() <= LIMITS[dtype] * want.norm()


@pytest.mark.parametrize("counts", LOADS, ids=str)
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_against_its_definition(backend: str, dtype: torch.dtype, counts: list[int]) -> None:
    if backend == "grouped_mm" and dtype == torch.float64:
        with pytest.raises(ValueError, match="does not take float64 on cpu; use 'auto' or 'loop'"):
            grouped_mm(*inputs(counts)[:2], counts, backend=backend)
        return
    check_against_definition(backend, counts, dtype, dtype)


@pytest.mark.parametrize("backend", HERE)
def test_float32_weights_under_bf16_rows(backend: str) -> None:
    check_against_definition(backend, [37, 0, 5, 70], torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", HERE)
def test_awkward_operands(backend: str) -> None:
    """Columns of a wider tensor, transposed weights, an expanded gradient from above, counts as a tensor."""
    x, w, _ = inputs([3, 0, 9])
    wide = torch.cat((x, x), dim=1).float()
    leaves = [wide[:, : x.shape[1]].requires_grad_(), w.mT.contiguous().mT.float().requires_grad_()]
    y = grouped_mm(*leaves, torch.tensor([3, 0, 9]), backend=backend)
    got = [y, *torch.autograd.grad(y.sum(), leaves)]
    for mine, want in zip(got, by_definition(x, w, [3, 0, 9], torch.ones_like(y.double())), strict=True):
        assert torch.allclose(mine.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"counts": [3, 8]}, "counts must be 3 row numbers that sum to 12, not 2 that sum to 11"),
        ({"counts": [3, -1, 10]}, "counts must be 3 row numbers"),
        (
            {"x": torch.zeros(12, 7)},
            r"x is \(R, K\) and w \(e, N, K\), all but R 1 or more, not \(12, 7\) and \(3, 24, 40\)",
        ),
        ({"w": torch.zeros(0, 24, 40), "counts": []}, "all but R 1 or more"),
        ({"w": torch.zeros(3, 0, 40)}, "all but R 1 or more"),
        ({"w": torch.zeros(3, 24, 40, device="meta")}, "grouped_mm: tensors are on cpu and on meta"),
        ({"counts": [3.0, 0.0, 9.0]}, "counts must be integers, not floats"),
        ({"counts": torch.tensor([3.0, 0.0, 9.0])}, r"counts must be integers \(3,\), not torch.float32"),
        ({"w": torch.zeros(3, 24, 40).bfloat16()}, "w is torch.bfloat16 but x is torch.float32"),
        ({"backend": "cublas"}, "grouped_mm has no backend 'cublas'; known: auto, loop"),
        ({"backend": "triton"}, "grouped_mm cannot run on backend 'triton': .*; use 'auto' or 'loop'"),
    ],
    ids=str,
)
def test_bad_operands(change: dict[str, object], complaint: str) -> None:
    x, w, _ = inputs([3, 0, 9])
    call = {"x": x.float(), "w": w.float(), "counts": [3, 0, 9], "backend": "auto"} | change
    with pytest.raises(ValueError, match=complaint) as error:
        grouped_mm(call.pop("x"), call.pop("w"), call.pop("counts"), **call)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
