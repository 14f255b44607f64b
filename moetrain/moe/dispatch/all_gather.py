"""Expert parallelism by all-gather: every rank sees all tokens, and computes the share of its experts."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass

import torch
import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.comm import all_gather_ints, all_gather_v, reduce_scatter_v
from moetrain.config.registry import DISPATCHERS
from moetrain.config.schema import STRICT
from moetrain.moe.dispatch import Dispatcher, Payload, Plan
from moetrain.moe.permute import RowOrder, count, order_by_expert, sum_rows
from moetrain.moe.routing import Routing, Rows


@dataclass(config=STRICT)
class AllGatherOptions:
    """Every token goes to every rank once, and one partial sum comes back; less traffic where top_k exceeds ep."""


@plain_dataclass(frozen=True)
class AllGatherLayout:
    """tokens, assignments: how many each rank has. own_A: which of all assignments go to this rank's experts.

    order: those, by expert; its tokens are numbered over all ranks. counts: rows of each local expert.
    """

    tokens: list[int]
    assignments: list[int]
    own_A: Tensor
    order: RowOrder
    counts: list[int]


@DISPATCHERS.register("all_gather", AllGatherOptions)
class AllGatherDispatcher(Dispatcher[AllGatherLayout]):
    """Tokens are gathered over the group, outputs summed by a reduce-scatter. The experts apply the weights."""

    group: dist.ProcessGroup

    def __init__(self, options: AllGatherOptions, n_experts: int, group: dist.ProcessGroup | None) -> None:
        if group is None:
            raise ValueError("the all_gather dispatcher needs the process group of the expert parallel ranks")
        super().__init__(n_experts, group)

    def layout(self, routing: Routing) -> AllGatherLayout:
        token_A, expert_A, _ = routing.assignments()
        rank, n_local = self.group.rank(), self.n_experts // self.group.size()
        sizes = all_gather_ints([routing.n_tokens, len(token_A)], self.group, token_A.device)
        tokens, assignments = ([size[i] for size in sizes] for i in (0, 1))
        pair_A2 = torch.stack([token_A + sum(tokens[:rank]), expert_A], dim=1)
        token_A, expert_A = all_gather_v(pair_A2, assignments, self.group).unbind(1)
        local_A = expert_A - rank * n_local
        own_A = ((local_A >= 0) & (local_A < n_local)).nonzero().squeeze(1)
        local_A = local_A.index_select(0, own_A)
        return AllGatherLayout(
            tokens=tokens,
            assignments=assignments,
            own_A=own_A,
            order=order_by_expert(token_A.index_select(0, own_A), local_A, sum(tokens)),
            counts=count(local_A, n_local).tolist(),
        )

    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[AllGatherLayout]) -> Payload:
        return x_TD, plan.weight_A

    def dispatch_communicate(self, payload: Payload, plan: Plan[AllGatherLayout]) -> Payload:
        x_TD, weight_A = payload
        x_ND = all_gather_v(x_TD, plan.layout.tokens, self.group)
        return x_ND, all_gather_v(weight_A, plan.layout.assignments, self.group)

    def dispatch_postprocess(self, payload: Payload, plan: Plan[AllGatherLayout]) -> Rows:
        x_ND, weight_A = payload
        order = plan.layout.order
        weight_R = weight_A.index_select(0, plan.layout.own_A.index_select(0, order.assignment_R))
        return Rows(x_ND, plan.layout.counts, index_R=order.token_R, weight_R=weight_R)

    def combine_preprocess(self, y_RD: Tensor, plan: Plan[AllGatherLayout]) -> Tensor:
        return sum_rows(y_RD, plan.layout.order)

    def combine_communicate(self, y_RD: Tensor, plan: Plan[AllGatherLayout]) -> Tensor:
        return reduce_scatter_v(y_RD, plan.layout.tokens, self.group)

    def combine_postprocess(self, y_RD: Tensor, plan: Plan[AllGatherLayout]) -> Tensor:
        return y_RD
