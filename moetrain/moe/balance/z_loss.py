"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): keeps router logits small, so that their rounding stays small."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.fields import STRICT
from moetrain.config.registry import BALANCE
from moetrain.moe.balance import BalanceMethod, Decision, Strength


@dataclass(config=STRICT)
class ZLossOptions:
    """Mean square of the logsumexp of each token's router logits."""

    coef: Strength = Field(0.001, description="coefficient, or {step: coefficient}")


@BALANCE.register("z_loss", ZLossOptions)
class ZLoss(BalanceMethod):
    """mean over tokens of logsumexp(logits)^2; the part of this rank's tokens is their sum."""

    has_term = True

    def __init__(self, options: ZLossOptions, n_experts: int) -> None:
        super().__init__()

    def term(self, decision: Decision) -> Tensor:
        return decision.logits_TE.logsumexp(dim=-1).square().sum()
