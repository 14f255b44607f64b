"""All experts on this rank: nothing is sent, and nothing is copied either."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass

import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.registry import DISPATCHERS
from moetrain.config.schema import STRICT, Config
from moetrain.moe.dispatch import Dispatcher, Payload, Plan
from moetrain.moe.permute import RowOrder, count, order_by_expert, permute, sum_rows
from moetrain.moe.routing import Routing, Rows


@dataclass(config=STRICT)
class LocalOptions:
    """Every rank holds all experts (parallel.ep = 1)."""

    def check(self, cfg: Config) -> None:
        """Raise ConfigError where the mapping splits the experts."""
        _refuse_expert_parallel(cfg.parallel.ep)


@plain_dataclass(frozen=True)
class LocalLayout:
    """order: rows of this rank's tokens by expert. counts: rows of each expert."""

    order: RowOrder
    counts: list[int]


@DISPATCHERS.register("local", LocalOptions)
class LocalDispatcher(Dispatcher[LocalLayout]):
    """Hands the kernels the order of the rows instead of the rows, and the weights beside it, to be fused there."""

    def __init__(self, options: LocalOptions, n_experts: int, group: dist.ProcessGroup | None) -> None:
        _refuse_expert_parallel(1 if group is None else group.size())
        super().__init__(n_experts, group)

    def layout(self, routing: Routing) -> LocalLayout:
        token_A, expert_A, _ = routing.assignments()
        order = order_by_expert(token_A, expert_A, routing.n_tokens)
        return LocalLayout(order, count(expert_A, self.n_experts).tolist())

    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[LocalLayout]) -> Payload:
        return (x_TD,)

    def dispatch_communicate(self, payload: Payload, plan: Plan[LocalLayout]) -> Payload:
        return payload

    def dispatch_postprocess(self, payload: Payload, plan: Plan[LocalLayout]) -> Rows:
        order = plan.layout.order
        weight_R = permute(plan.weight_A, order.assignment_R, order.row_A)
        return Rows(payload[0], plan.layout.counts, index_R=order.token_R, weight_R=weight_R)

    def combine_preprocess(self, y_RD: Tensor, plan: Plan[LocalLayout]) -> Tensor:
        return y_RD

    def combine_communicate(self, y_RD: Tensor, plan: Plan[LocalLayout]) -> Tensor:
        return y_RD

    def combine_postprocess(self, y_RD: Tensor, plan: Plan[LocalLayout]) -> Tensor:
        return sum_rows(y_RD, plan.layout.order)


def _refuse_expert_parallel(ep: int) -> None:
    if ep > 1:
        raise ConfigError(
            f"dispatch=local needs all experts on every rank, but parallel.ep={ep}; "
            f"use dispatch=all_to_all or parallel.ep=1"
        )
