"""Rotary positions as transformers turns them, as complex numbers turn, and back again for gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_kernels import rope
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.kernels.ops import BACKENDS, compare, normal, run

# B, S, H, d, r; heads that are no power of two, and heads that are turned in part.
SIZES = [(2, 5, 3, 8, 8), (1, 7, 4, 20, 12), (2, 1, 1, 6, 2), (0, 3, 2, 4, 4)]


def tables(B: int, S: int, r: int, per_sequence: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angle = normal(B, S, 1, r // 2) if per_sequence else normal(S, 1, r // 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def by_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Each pair is a complex number, which is multiplied by cos + i sin."""
    r = 2 * cos.shape[-1]
    pairs = x[..., :r].unflatten(-1, (-1, 2)) if interleaved else x[..., :r].unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag, x[..., r:]), dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_turns_pairs(size: tuple[int, ...], per_sequence: bool, interleaved: bool, backend: str) -> None:
    B, S, H, d, r = size
    cos, sin = tables(B, S, r, per_sequence)
    want = run(lambda x: by_complex_numbers(x, cos, sin, interleaved), {"x": normal(B, S, H, d)})
    dtype = torch.float64 if backend == "torch" else torch.float32
    c, s = cos.to(dtype), sin.to(dtype)
    got = run(lambda x: rope(x, c, s, interleaved=interleaved, backend=backend), {"x": normal(B, S, H, d)}, dtype)
    compare(got, want, 1e-14 if backend == "torch" else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_transformers(backend: str) -> None:
    x_BSHd, (cos, sin) = normal(2, 6, 3, 16).float(), tables(2, 6, 16, True, torch.float32)
    twice = [t.squeeze(2).repeat(1, 1, 2) for t in (cos, sin)]
    want, _ = apply_rotary_pos_emb(x_BSHd, x_BSHd, *twice, unsqueeze_dim=2)
    torch.testing.assert_close(rope(x_BSHd, cos, sin, backend=backend), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    """Three roundings at most; in the interpreter, which cuts bf16 off, one of twice the size."""
    x = normal(2, 6, 3, 16, dtype=dtype)
    cos, sin = tables(2, 6, 16, False, dtype)
    want = by_complex_numbers(x, cos.double(), sin.double(), False)
    got = rope(x.to(dtype), cos, sin, backend=backend)
    limit = 1.5 * torch.finfo(dtype).eps * want.abs().max()
    assert got.dtype == dtype and (got.double() - want).abs().max() < limit


def test_keeps_only_the_tables() -> None:
    kept: list[Tensor] = []
    x, (cos, sin) = normal(2, 5, 3, 8).requires_grad_(), tables(2, 5, 8, False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        rope(x, cos, sin, interleaved=True)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_compile(backend: str) -> None:
    cos, sin = tables(2, 5, 8, False, torch.float32)

    def op(x: Tensor) -> Tensor:
        return rope(x.square(), cos, sin, interleaved=True, backend=backend)

    inputs = {"x": normal(2, 5, 3, 8)}
    got, want = (run(f, inputs, torch.float32) for f in (torch.compile(op, backend="aot_eager", fullgraph=True), op))
    compare(got, want, 1e-6)  # torch's operators, and what is compiled for the CPU


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cos": torch.zeros(4, 1, 4)}, r"not \(2, 5, 3, 8\), \(4, 1, 4\) and \(5, 1, 4\)"),
        ({"x": torch.zeros(2, 5, 3, 6)}, "with 0 < r <= d"),
        ({"cos": torch.zeros(5, 1, 0), "sin": torch.zeros(5, 1, 0)}, "with 0 < r <= d"),
        ({"cos": torch.zeros(5, 1, 4, device="meta")}, "tensors are on cpu and on meta"),
        ({"x": torch.zeros(5, 3, 8)}, r"x is \(B, S, H, d\)"),
        ({"sin": torch.zeros(5, 1, 4).double()}, "sin torch.float64, but x is torch.float32; rope needs one dtype"),
        ({"backend": "flash"}, "rope has no backend 'flash'"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    inputs: dict[str, Any] = {"x": torch.zeros(2, 5, 3, 8), "cos": torch.zeros(5, 1, 4), "sin": torch.zeros(5, 1, 4)}
    with pytest.raises(ValueError, match=complaint) as error:
        rope(**inputs | change)
    assert "\n" not in str(error.value)
