"""All experts on this rank: nothing is sent, and nothing is copied either."""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.comm import Group, Pending
from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT
from moetrain.config.registry import DISPATCHERS
from moetrain.config.schema import Config
from moetrain.moe.dispatch import Dispatcher, Payload, Plan, held
from moetrain.moe.dispatch.held import Held
from moetrain.moe.routing import Routing, Rows


@dataclass(config=STRICT)
class LocalOptions:
    """Every rank holds all experts (parallel.ep = 1)."""

    def check(self, cfg: Config) -> None:
        """Raise ConfigError where the mapping splits the experts."""
        _refuse_expert_parallel(cfg.parallel.ep)


@DISPATCHERS.register("local", LocalOptions)
class LocalDispatcher(Dispatcher[Held]):
    """Layout and work are those of ``held``: only etp ranks, which each hold a part of all experts, exchange."""

    def __init__(self, options: LocalOptions, n_experts: int, group: Group, etp_group: Group) -> None:
        _refuse_expert_parallel(1 if group is None else group.size())
        super().__init__(n_experts, group, etp_group)

    def layout(self, routing: Routing) -> Held:
        token_A, expert_A, _ = routing.assignments()
        top_k = None if routing.ids_TK is None else routing.ids_TK.shape[1]
        return held.hold(token_A, expert_A, routing.n_tokens, self.n_experts, self.etp_group, top_k)

    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[Held]) -> Payload:
        return x_TD, plan.weight_A

    def dispatch_communicate(self, payload: Payload, plan: Plan[Held]) -> Payload:
        x_TD, weight_A = payload
        return held.gather(x_TD, weight_A, plan.layout, self.etp_group)

    def dispatch_postprocess(self, payload: Payload, plan: Plan[Held]) -> Rows:
        x_ND, weight_A = payload
        return held.rows(x_ND, weight_A, plan.layout)

    def combine_preprocess(self, y_RD: Tensor, plan: Plan[Held]) -> Tensor:
        return held.sum_per_token(y_RD, plan.layout)

    def combine_communicate(self, y_ND: Tensor, plan: Plan[Held]) -> Pending:
        return held.start_scatter(y_ND, plan.layout, self.etp_group)

    def combine_postprocess(self, y_TD: Tensor, plan: Plan[Held]) -> Tensor:
        return y_TD


def _refuse_expert_parallel(ep: int) -> None:
    if ep > 1:
        raise ConfigError(
            f"dispatch=local needs all experts on every rank, but parallel.ep={ep}; "
            f"use dispatch=all_to_all or parallel.ep=1"
        )
