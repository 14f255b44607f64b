"""Expert parallelism by all-to-all: a row travels to the rank of its expert and back, and nothing else does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass as plain_dataclass

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.comm import Group, Pending, all_gather_v, all_to_all, reduce_scatter_v, start_all_to_all
from moetrain.config.fields import STRICT
from moetrain.config.registry import DISPATCHERS
from moetrain.moe.dispatch import Dispatcher, Payload, Plan
from moetrain.moe.permute import RowOrder, count, gather_rows, inverse, order_by_expert, permute, sum_rows
from moetrain.moe.routing import Routing, Rows


@dataclass(config=STRICT)
class AllToAllOptions:
    """Rows travel to the ranks of their experts and back; the least traffic while top_k is below parallel.ep."""


@plain_dataclass(frozen=True)
class AllToAllLayout:
    """order: this rank's rows by expert, thus by destination. send, receive: rows to and from each rank.

    Received rows come by source rank and, within one, by expert; held: how many each etp rank has of them. by_expert_R
    sorts those of all etp ranks by expert (then etp rank, then source); by_source_R is its inverse. counts: rows of
    each local expert.
    """

    order: RowOrder
    send: list[int]
    receive: list[int]
    held: list[int]
    counts: list[int]
    by_expert_R: Tensor
    by_source_R: Tensor


@DISPATCHERS.register("all_to_all", AllToAllOptions)
class AllToAllDispatcher(Dispatcher[AllToAllLayout]):
    """Weights stay at home: they multiply the outputs that come back."""

    def __init__(self, options: AllToAllOptions, n_experts: int, group: Group, etp_group: Group) -> None:
        if group is None:
            raise ValueError("the all_to_all dispatcher needs the process group of the expert parallel ranks")
        super().__init__(n_experts, group, etp_group)
        self.size = group.size()

    def layout(self, routing: Routing) -> AllToAllLayout:
        token_A, expert_A, _ = routing.assignments()
        order = order_by_expert(token_A, expert_A, routing.n_tokens)
        n = self.size
        mine_ne = count(expert_A, self.n_experts).view(n, -1)
        theirs_ne = all_to_all(mine_ne, [1] * n, [1] * n, self.group)
        etp, rank = (1, 0) if self.etp_group is None else (self.etp_group.size(), self.etp_group.rank())
        held_pne = all_gather_v(theirs_ne[None], [1] * etp, self.etp_group)
        # One transfer to the host for both.
        mine, *held = torch.cat([mine_ne[None], held_pne]).tolist()
        rows = [sum(map(sum, counts)) for counts in held]
        local_expert_pne = torch.arange(held_pne.shape[2], device=held_pne.device).expand_as(held_pne)
        expert_R = local_expert_pne.reshape(-1).repeat_interleave(held_pne.view(-1), output_size=sum(rows))
        by_expert_R = expert_R.argsort(stable=True)
        return AllToAllLayout(
            order=order,
            send=[sum(counts) for counts in mine],
            receive=[sum(counts) for counts in held[rank]],
            held=rows,
            counts=[sum(counts) for counts in zip(*itertools.chain(*held), strict=True)],
            by_expert_R=by_expert_R,
            by_source_R=inverse(by_expert_R),
        )

    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[AllToAllLayout]) -> Payload:
        return (gather_rows(x_TD, plan.layout.order),)

    def dispatch_communicate(self, payload: Payload, plan: Plan[AllToAllLayout]) -> Payload:
        x_RD = all_to_all(payload[0], plan.layout.receive, plan.layout.send, self.group)
        return (all_gather_v(x_RD, plan.layout.held, self.etp_group),)

    def dispatch_postprocess(self, payload: Payload, plan: Plan[AllToAllLayout]) -> Rows:
        return Rows(payload[0], plan.layout.counts, index_R=plan.layout.by_expert_R)

    def combine_preprocess(self, y_RD: Tensor, plan: Plan[AllToAllLayout]) -> Tensor:
        return permute(y_RD, plan.layout.by_source_R, plan.layout.by_expert_R)

    def combine_communicate(self, y_RD: Tensor, plan: Plan[AllToAllLayout]) -> Pending:
        y_RD = reduce_scatter_v(y_RD, plan.layout.held, self.etp_group)
        return start_all_to_all(y_RD, plan.layout.send, plan.layout.receive, self.group)

    def combine_postprocess(self, y_RD: Tensor, plan: Plan[AllToAllLayout]) -> Tensor:
        return sum_rows(y_RD, plan.layout.order, plan.weight_A)
