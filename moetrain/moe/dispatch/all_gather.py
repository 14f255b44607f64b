"""Expert parallelism by all-gather: every rank sees all tokens, and computes the share of its experts."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.comm import Group, Pending, all_gather_ints, all_gather_v, start_reduce_scatter_v
from moetrain.config.fields import STRICT
from moetrain.config.registry import DISPATCHERS
from moetrain.moe.dispatch import Dispatcher, Payload, Plan, held
from moetrain.moe.dispatch.held import Held
from moetrain.moe.routing import Routing, Rows


@dataclass(config=STRICT)
class AllGatherOptions:
    """Every token goes to every rank once, and one partial sum comes back; less traffic where top_k exceeds ep."""


@plain_dataclass(frozen=True)
class AllGatherLayout:
    """tokens, assignments: how many each rank has. own_A: which of all assignments go to this rank's experts.

    held: those, with the tokens of all ranks.
    """

    tokens: list[int]
    assignments: list[int]
    own_A: Tensor
    held: Held


@DISPATCHERS.register("all_gather", AllGatherOptions)
class AllGatherDispatcher(Dispatcher[AllGatherLayout]):
    """Tokens are gathered over the group, outputs summed by a reduce-scatter. The experts apply the weights."""

    def __init__(self, options: AllGatherOptions, n_experts: int, group: Group, etp_group: Group) -> None:
        if group is None:
            raise ValueError("the all_gather dispatcher needs the process group of the expert parallel ranks")
        super().__init__(n_experts, group, etp_group)
        self.rank, self.n_local = group.rank(), n_experts // group.size()

    def layout(self, routing: Routing) -> AllGatherLayout:
        token_A, expert_A, _ = routing.assignments()
        sizes = all_gather_ints([routing.n_tokens, len(token_A)], self.group, token_A.device)
        tokens, assignments = ([size[i] for size in sizes] for i in (0, 1))
        pair_A2 = torch.stack([token_A + sum(tokens[: self.rank]), expert_A], dim=1)
        token_A, expert_A = all_gather_v(pair_A2, assignments, self.group).t().contiguous()
        local_A = expert_A - self.rank * self.n_local
        own_A = ((local_A >= 0) & (local_A < self.n_local)).nonzero().squeeze(1)
        token_A, local_A = (a.index_select(0, own_A) for a in (token_A, local_A))
        own = held.hold(token_A, local_A, sum(tokens), self.n_local, self.etp_group)
        return AllGatherLayout(tokens, assignments, own_A, own)

    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[AllGatherLayout]) -> Payload:
        return x_TD, plan.weight_A

    def dispatch_communicate(self, payload: Payload, plan: Plan[AllGatherLayout]) -> Payload:
        x_TD, weight_A = payload
        x_ND = all_gather_v(x_TD, plan.layout.tokens, self.group)
        weight_A = all_gather_v(weight_A, plan.layout.assignments, self.group)
        return held.gather(x_ND, weight_A.index_select(0, plan.layout.own_A), plan.layout.held, self.etp_group)

    def dispatch_postprocess(self, payload: Payload, plan: Plan[AllGatherLayout]) -> Rows:
        x_ND, weight_A = payload
        return held.rows(x_ND, weight_A, plan.layout.held)

    def combine_preprocess(self, y_RD: Tensor, plan: Plan[AllGatherLayout]) -> Tensor:
        return held.sum_per_token(y_RD, plan.layout.held)

    def combine_communicate(self, y_ND: Tensor, plan: Plan[AllGatherLayout]) -> Pending:
        y_ND = held.start_scatter(y_ND, plan.layout.held, self.etp_group).wait()
        return start_reduce_scatter_v(y_ND, plan.layout.tokens, self.group)

    def combine_postprocess(self, y_TD: Tensor, plan: Plan[AllGatherLayout]) -> Tensor:
        return y_TD
