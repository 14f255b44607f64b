"""What an expert layer computes on: one value, filled and checked in ``api`` and taken by every path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.checks import check_counts, check_one_device
from moe_kernels.permutation import unpermute


class Setting(NamedTuple):
    """What decides whether a path can run: experts of width ``expert_dim`` in a model of width ``dim``; dtype is that
    of x, bias whether there are b13 and b2."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    expert_dim: int
    activation: str = "swiglu"
    bias: bool = False
    fp8: bool = False


class Operands(NamedTuple):
    """See ``moe_kernels.expert_mlp``. counts: a list, but a tensor of integers where the path takes one.

    row_TK: int64 (T, K) or None. With it a path gives out_TD, the sum of each token's rows, instead of y_RD. Then
    index_R gives each row's token, and every row is named once.
    """

    x_ND: Tensor
    counts: list[int] | Tensor
    w13: Tensor
    w2: Tensor
    index_R: Tensor | None = None
    weight_R: Tensor | None = None
    b13: Tensor | None = None
    b2: Tensor | None = None
    activation: str = "swiglu"
    row_TK: Tensor | None = None

    @staticmethod
    def needed(ctx: Any) -> tuple[bool, ...]:
        """In a function of all operands, in order: whether x, w13, w2, weight_R, b13 and b2 need gradients."""
        x, _, w13, w2, _, weight, b13, b2, *_ = ctx.needs_input_grad
        return x, w13, w2, weight, b13, b2

    @staticmethod
    def gradients(
        dx: Tensor | None,
        dw13: Tensor | None,
        dw2: Tensor | None,
        dweight: Tensor | None,
        db13: Tensor | None,
        db2: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """What its backward returns: a gradient or None for each operand."""
        return dx, None, dw13, dw2, None, dweight, db13, db2, None, None

    def check(self) -> None:
        """Raises ValueError where shapes, dtypes or counts do not fit."""
        x_ND, w13, activation = self.x_ND, self.w13, self.activation
        if activation not in ACTIVATIONS:
            raise ValueError(f"no activation is called {activation!r}; known: {', '.join(ACTIVATIONS)}")
        n = ACTIVATIONS[activation].matrices
        if x_ND.dim() != 2 or w13.dim() != 4 or w13.shape[1] != n:
            shapes = f"{tuple(x_ND.shape)} and {tuple(w13.shape)}"
            raise ValueError(f"with {activation} x is (N, D) and w13 (e, {n}, F, D), not {shapes}")
        R = len(x_ND if self.index_R is None else self.index_R)
        e, _, F, D = w13.shape
        expected = (
            ("x", x_ND, (x_ND.shape[0], D)),
            ("w2", self.w2, (e, D, F)),
            ("index_R", self.index_R, (R,)),
            ("weight_R", self.weight_R, (R,)),
            ("b13", self.b13, (e, n, F)),
            ("b2", self.b2, (e, D)),
        )
        for name, tensor, shape in expected:
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} where w13 {tuple(w13.shape)} needs {shape}")
        if self.index_R is not None and self.index_R.dtype != torch.int64:
            raise ValueError(f"index_R is int64, not {self.index_R.dtype}")
        row = self.row_TK
        if row is not None and (self.index_R is None or row.dtype != torch.int64 or row.dim() != 2):
            raise ValueError(f"row_TK is int64 (N, K), beside index_R, not {row.dtype} of shape {tuple(row.shape)}")
        if row is not None and (len(row) != len(x_ND) or row.numel() != R):
            raise ValueError(f"row_TK has shape {tuple(row.shape)} where {len(x_ND)} tokens have {R} rows")
        if 0 in w13.shape:
            raise ValueError(f"w13 has shape {tuple(w13.shape)}; (e, {n}, F, D) are all 1 or more")
        self._check_dtypes()
        check_one_device("experts", x_ND, row, *(tensor for _, tensor, _ in expected[1:]))
        check_counts(self.counts, e, R)

    def _check_dtypes(self) -> None:
        x, w13 = self.x_ND.dtype, self.w13.dtype
        half = x in (torch.bfloat16, torch.float16)
        if w13 != x and not (half and w13 == torch.float32):
            raise ValueError(f"w13 is {w13} but x is {x}; the experts need one dtype, or float32 parameters")
        for name, tensor in (("w2", self.w2), ("b13", self.b13), ("b2", self.b2)):
            if tensor is not None and tensor.dtype != w13:
                raise ValueError(f"{name} is {tensor.dtype} but w13 is {w13}; parameters need one dtype")

    def in_one_dtype(self) -> Operands:
        """Parameters rounded to x's dtype."""
        b13, b2 = (None if b is None else b.to(self.x_ND.dtype) for b in (self.b13, self.b2))
        w13, w2 = self.w13.to(self.x_ND.dtype), self.w2.to(self.x_ND.dtype)
        return self._replace(w13=w13, w2=w2, b13=b13, b2=b2)

    @property
    def setting(self) -> Setting:
        """Where and as what these are."""
        x, bias = self.x_ND, self.b13 is not None or self.b2 is not None
        return Setting(x.device, x.dtype, self.w13.shape[-1], self.w2.shape[-1], self.activation, bias)

    @property
    def row_counts(self) -> list[int]:
        """counts as a list: waits for the GPU if they are a tensor there."""
        return self.counts.tolist() if isinstance(self.counts, Tensor) else self.counts

    def rows(self) -> Tensor:
        """rows_RD (R, D): x of each row."""
        return self.x_ND if self.index_R is None else self.x_ND.index_select(0, self.index_R)

    def weighted(self, y_RD: Tensor) -> Tensor:
        """y_RD times the rows' weights if there are any; with row_TK the sums of each token's rows, out_TD."""
        if self.weight_R is not None:
            y_RD = (y_RD * self.weight_R[:, None]).to(y_RD.dtype)
        if self.row_TK is None:
            return y_RD
        return unpermute(y_RD, self.row_TK)
