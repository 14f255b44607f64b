"""Backends of the ops that are not the expert layer, and every gradient of one.

Their Triton kernels run in Triton's interpreter, which must be asked for before they are imported, and which other
tests want none of: ``test_triton_ops`` starts a process for it. There the tests of "triton" run, and nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
if INTERPRETED:
    import tests.kernels.interpreter  # noqa: F401
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_triton_ops starts")
BACKENDS = ["torch", pytest.param("triton", marks=interpreted)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Float64 numbers that ``dtype`` has, so that whoever computes starts from the same."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).double()


def run(op: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The outputs of ``op``, by number, and the gradients of <smooth outputs, cos(1, 2, ...)> in every input: float64.

    ``inputs`` are cast to ``dtype``; the cosines are numbers that every dtype has.
    """
    leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
    outs = op(**leaves)
    outs = (outs,) if isinstance(outs, Tensor) else tuple(out for out in outs if out is not None)
    smooth = [out for out in outs if out.requires_grad]
    above = [torch.arange(1.0, out.numel() + 1).cos().bfloat16().view_as(out).to(out.dtype) for out in smooth]
    grads = torch.autograd.grad(smooth, list(leaves.values()), above)
    assert all(grad.dtype == dtype for grad in grads)
    found = {str(i): out.detach().double() for i, out in enumerate(outs)}
    return found | {name: grad.double() for name, grad in zip(leaves, grads, strict=True)}


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within ``tolerance`` of the other's largest number."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        limit = tolerance * max(t.abs().max().item(), 1e-30) if t.numel() else 0.0
        assert got[name].shape == t.shape and (got[name] - t).abs().le(limit).all(), name
