"""RMSNorm against its formula in float64: values, gradients, what is kept, and the same bits again."""

from __future__ import annotations

import pytest
import torch
from moe_kernels import norm, rms_norm
from torch import Tensor

from tests.kernels.ops import BACKENDS, compare, normal, run

EPS = 1e-5
# Rows and width: a power of two, an odd one, one row, no rows; and more rows than one sum of the weight's gradient has.
SHAPES = [(6, 64), (37, 24), (1, 5), (0, 8), (3, 7, 48)]


def formula(x: Tensor, weight: Tensor, offset: float = 0.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + offset)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_its_formula(shape: tuple[int, ...], offset: float, backend: str) -> None:
    inputs = {"x": normal(*shape), "weight": normal(shape[-1])}
    want = run(lambda **t: formula(**t, offset=offset), inputs)
    dtype = torch.float64 if backend == "torch" else torch.float32
    got = run(lambda **t: rms_norm(**t, eps=EPS, offset=offset, backend=backend), inputs, dtype)
    compare(got, want, 1e-12 if backend == "torch" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """The interpreter cuts off where it makes bf16, so a number may be off by one place there, else by half of one."""
    inputs = {"x": normal(40, 32, dtype=dtype), "weight": normal(32, dtype=dtype)}
    want = run(formula, inputs)
    got = run(lambda **t: rms_norm(**t, eps=EPS, backend=backend), inputs, dtype)
    places = torch.finfo(dtype).eps * (0.5 if backend == "torch" else 1)
    for name, t in want.items():
        assert (got[name] - t).abs().le(places * t.abs() + 1e-5).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gradients_along_the_row_cancel(backend: str) -> None:
    """A gradient that points along x changes y not at all: what is left of it is rounding."""
    x = normal(4, 64).float().requires_grad_()
    y = rms_norm(x, torch.ones(64), 1e-12, backend=backend)
    (dx,) = torch.autograd.grad(y, x, x.detach() * 1000)
    assert dx.abs().max() < 1000 * 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_the_input_and_a_number_per_row(backend: str) -> None:
    x, weight = normal(10, 64).bfloat16().requires_grad_(), torch.ones(64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        rms_norm(x, weight, EPS, backend=backend)
    assert sorted(t.numel() * t.element_size() for t in kept) == [10 * 4, 64 * 4, 10 * 64 * 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_stays_alone(backend: str) -> None:
    inputs = {"x": normal(30, 16), "weight": normal(16)}
    want = run(lambda **t: rms_norm(**t, eps=EPS, backend=backend), inputs, torch.float32)
    inputs["x"][7, 3] = float("nan")
    got = run(lambda **t: rms_norm(**t, eps=EPS, backend=backend), inputs, torch.float32)
    others = torch.arange(30) != 7
    for name in ("0", "x"):
        assert got[name][7].isnan().all() and torch.equal(got[name][others], want[name][others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again_and_one_graph_under_compile(backend: str) -> None:
    def op(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, EPS, backend=backend)

    inputs = {"x": normal(300, 16), "weight": normal(16)}
    first, again = (run(op, inputs, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    compare(run(torch.compile(op, backend="aot_eager", fullgraph=True), inputs, torch.float32), first, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_may_be_an_integer(backend: str) -> None:
    x, weight = normal(3, 16).float(), normal(16).float()
    compare({"y": rms_norm(x, weight, 1, backend=backend)}, {"y": rms_norm(x.double(), weight.double(), 1.0)}, 1e-6)


def test_many_rows_are_summed_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of another length: the same gradients, up to rounding."""
    inputs = {"x": normal(50, 16), "weight": normal(16)}
    want = run(formula, inputs)
    monkeypatch.setattr(norm, "ROWS", 8)
    compare(run(lambda **t: rms_norm(**t, eps=EPS), inputs), want, 1e-12)


def test_bad_inputs() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\) where x \(3, 8\) needs \(8,\)"):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match="rms_norm has no backend 'cuda'; known: auto, torch, triton"):
        rms_norm(x, torch.ones(8), EPS, backend="cuda")
    with pytest.raises(ValueError, match=r"rms_norm cannot run on backend 'triton': .*; use 'auto' or 'torch'"):
        rms_norm(x.double(), torch.ones(8), EPS, backend="triton")
    with pytest.raises(ValueError, match="rms_norm: tensors are on cpu and on meta"):
        rms_norm(x, torch.ones(8, device="meta"), EPS)
    for bad in (x.long(), x[:, :0], torch.ones(())):
        with pytest.raises(ValueError, match=r"x has floats, \(\.\.\., D\) with D > 0, not"):
            rms_norm(bad, torch.ones(8), EPS)
