"""Inputs of expert computations, and every gradient of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from moe_kernels import ACTIVATIONS, expert_mlp
from torch import Tensor

# Even, uneven, empty at either end and in the middle, one expert taking all, and no rows at all.
LOADS = ([8, 8, 8, 8], [37, 0, 5, 70], [0, 3, 1, 0], [0, 0, 65, 0], [0, 0, 0, 0])
DIM, EXPERT_DIM, TOKENS = 16, 8, 24


@dataclass
class Case:
    """One call of ``expert_mlp``, in float64. ``inputs`` are differentiable and named as its arguments."""

    counts: list[int]
    activation: str
    index_R: Tensor | None
    inputs: dict[str, Tensor]
    upstream_RD: Tensor = field(repr=False)

    def run(
        self, backend: str, dtype: torch.dtype, parameters: torch.dtype | None = None, fp8: bool = False
    ) -> dict[str, Tensor]:
        """The output, and the gradient of <output, upstream> with respect to every input, in float64.

        parameters: dtype of the experts' weights and biases, where it is another.
        """
        wide = dict.fromkeys(("w13", "w2", "b13", "b2"), parameters or dtype)
        inputs = {name: t.to(wide.get(name, dtype)).requires_grad_() for name, t in self.inputs.items()}
        y_RD = expert_mlp(
            **inputs, counts=self.counts, index_R=self.index_R, activation=self.activation, backend=backend, fp8=fp8
        )
        assert y_RD.dtype == dtype
        grads = torch.autograd.grad(y_RD, list(inputs.values()), self.upstream_RD.to(dtype))
        assert all(grad.dtype == t.dtype for grad, t in zip(grads, inputs.values(), strict=True))
        return {name: t.double() for name, t in zip(("y", *inputs), (y_RD.detach(), *grads), strict=True)}


def make_case(
    counts: list[int],
    activation: str = "swiglu",
    *,
    gather: bool = True,
    weights: bool = True,
    bias: bool = False,
    dim: int = DIM,
    expert_dim: int = EXPERT_DIM,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Random inputs, rounded to ``dtype`` so that all backends start from the same numbers.

    Pre-activations are about 1 in size in half precision; in float64 they also pass 10, where clamps are (rounding
    would decide on which side of the step in its derivative a number falls).
    """
    g = torch.Generator().manual_seed(sum(counts) + len(counts))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).double()

    e, n, R = len(counts), ACTIVATIONS[activation].matrices, sum(counts)
    inputs = {"x_ND": normal(tokens if gather else R, dim), "w13": normal(e, n, expert_dim, dim)}
    inputs["w2"] = normal(e, dim, expert_dim)
    if weights:
        inputs["weight_R"] = normal(R).sigmoid().to(dtype).double()
    if bias:
        inputs |= {"b13": normal(e, n, expert_dim), "b2": normal(e, dim)}
    index_R = torch.randint(tokens, (R,), generator=g) if gather else None
    inputs["w13"] = (inputs["w13"] * (1.0 if dtype == torch.float64 else dim**-0.5)).to(dtype).double()
    return Case(counts, activation, index_R, inputs, normal(R, dim))


def refused_twice(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A gradient of op's gradient is refused: it must not come out as if the gradient were constant."""
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (dx.square().sum() + x.square().sum()).backward()
