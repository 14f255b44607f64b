"""Balance without an auxiliary loss: a bias per expert, nudged after each step (arXiv 2408.15664; DeepSeek-V3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.fields import STRICT, value_at
from moetrain.config.registry import BALANCE
from moetrain.moe.balance import BalanceMethod, Strength


@dataclass(config=STRICT)
class BiasOptions:
    """A bias on the scores by which experts are chosen; the weights of the chosen do not see it."""

    rate: Strength = Field(0.001, description="how far a bias moves in one step, or {step: rate}")


@BALANCE.register("bias", BiasOptions)
class Bias(BalanceMethod):
    """b_e += rate * sign(mean load - load_e) after each step, with the loads of the whole global batch.

    The sign is taken of integers: loads kept in a narrow float would flip it. bias_E is float32 at least, for a bias of
    order 1 cannot take steps of 1e-3 in bfloat16.
    """

    bias_E: Tensor

    def __init__(self, options: BiasOptions, n_experts: int) -> None:
        super().__init__()
        self.rate = options.rate
        self.register_buffer("bias_E", torch.zeros(n_experts, dtype=torch.float32))

    def selection_bias(self) -> Tensor | None:
        return self.bias_E

    def after_step(self, counts_E: Tensor, step: int) -> None:
        direction_E = torch.sign(counts_E.sum() - counts_E * len(counts_E))
        self.bias_E.add_(direction_E.to(self.bias_E.dtype), alpha=value_at(self.rate, step))

    def reset_buffers(self) -> None:
        self.bias_E.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        if self.bias_E.dtype.itemsize < bias_E.dtype.itemsize:
            self.bias_E = bias_E.to(self.bias_E.device)
        return self
