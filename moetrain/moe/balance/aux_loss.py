"""The load balancing loss of Switch Transformer (arXiv 2101.03961, eq. 4 to 6), for any top-k."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.fields import STRICT
from moetrain.config.registry import BALANCE
from moetrain.moe.balance import BalanceMethod, Decision, Strength
from moetrain.moe.permute import count


@dataclass(config=STRICT)
class AuxLossOptions:
    """Switch-style auxiliary loss; 1 when perfectly balanced, whatever the number of experts and top_k."""

    coef: Strength = Field(0.01, description="coefficient, or {step: coefficient}")
    scope: Literal["sequence", "step", "micro_batch"] = Field(
        "step",
        description="tokens whose loads count: each sequence's own, the global batch's (of the step before), or the "
        "micro-batch's over all ranks (depends on the micro-batch count)",
    )


@BALANCE.register("aux_loss", AuxLossOptions)
class AuxLoss(BalanceMethod):
    """E * sum_e f_e P_e, with f_e the share of all choices that expert e got and P_e the mean of its probability.

    f has no gradient. Each rank adds its own tokens' part of P, ``E * sum_e f_e * sum_t p_te``; over the ranks and
    divided by the number of tokens these add up to the loss. The mean is taken per scope, as f is:

    sequence: f over each sequence, the loss averaged over sequences (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20).
    step: f over the global batch (Qwen, arXiv 2501.11873). Known only when every micro-batch has been routed, by which
        time backward has begun, so the loads of the step before stand in for it; uniform at step 0.
    micro_batch: f over the micro-batch, summed over ``decision.group``. As in Megatron-Core and OLMo-core.
    """

    has_term = True
    loads_E: Tensor

    def __init__(self, options: AuxLossOptions, n_experts: int) -> None:
        super().__init__()
        self.scope = options.scope
        self.n_experts = n_experts
        if self.scope == "step":
            self.register_buffer("loads_E", torch.zeros(n_experts, dtype=torch.int64))

    def term(self, decision: Decision) -> Tensor:
        probs_TE = decision.probs()
        # Decided once per token: a recomputed block must neither communicate nor count again.
        loads_GE = decision.context.memo.once("aux_loss.loads", lambda: self._loads(decision))
        total_G1 = loads_GE.sum(1, keepdim=True)
        share_GE = loads_GE.to(probs_TE.dtype) / total_G1.clamp(min=1)
        share_GE = torch.where(total_G1 > 0, share_GE, 1 / self.n_experts)
        group_size = decision.context.seq_len if self.scope == "sequence" else len(probs_TE)
        probs_GE = probs_TE.view(len(loads_GE), group_size, self.n_experts).sum(1)
        return self.n_experts * (share_GE * probs_GE).sum()

    def _loads(self, decision: Decision) -> Tensor:
        """Integer loads of each of G groups of consecutive tokens: the sequences, or all tokens as one group."""
        if self.scope == "step":
            return self.loads_E.unsqueeze(0).clone()
        if self.scope == "micro_batch":
            return _sum_over(decision.group, decision.counts_E.unsqueeze(0).clone())
        (T, K), S, E = decision.ids_TK.shape, decision.context.seq_len, self.n_experts
        B = T // S
        first_id_B11 = E * torch.arange(B, device=decision.ids_TK.device).view(B, 1, 1)
        ids_BSK = decision.ids_TK.view(B, S, K) + first_id_B11
        return _sum_over(decision.sequence_group, count(ids_BSK, B * E).view(B, E))

    def after_step(self, counts_E: Tensor, step: int) -> None:
        if self.scope == "step":
            self.loads_E.copy_(counts_E)

    def reset_buffers(self) -> None:
        if self.scope == "step":
            self.loads_E.zero_()


def _sum_over(group: dist.ProcessGroup | None, loads: Tensor) -> Tensor:
    if group is not None:
        dist.all_reduce(loads, group=group)
    return loads
