"""Node-aware expert parallelism: a token crosses to another node once, however many of its experts are there.

First hop: to the rank of each node that has this rank's place in its own node (so that every link between nodes has its
pair of ranks, as network rails have). Second hop, inside the node: to the ranks that hold the experts. On the way back
outputs are summed on the experts' rank, then inside the node, and one sum per node goes home. Hierarchical all-to-all
is DeepSpeed-MoE's (arXiv 2201.05596); one crossing per token and node is DeepSeek-V3's (arXiv 2412.19437, 3.2.2).

Both hops run on the whole group, with nothing for ranks out of reach: no other groups are needed.
"""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.comm import Group, Pending
from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import DISPATCHERS
from moetrain.config.schema import Config
from moetrain.moe.dispatch import Dispatcher, Payload, Plan, held
from moetrain.moe.dispatch.held import Held
from moetrain.moe.dispatch.hop import Hop, plan_hop, start_back, there
from moetrain.moe.routing import Routing, Rows


@dataclass(config=STRICT)
class TwoStepOptions:
    """A token crosses once to each node that has experts of it, and is spread inside; sums come back the same way."""

    node_size: Positive = Field(
        default=8, description="expert parallel ranks of one node: those that share the fast links"
    )

    def check(self, cfg: Config) -> None:
        """Raise ConfigError where the expert parallel ranks cannot be cut into nodes."""
        _refuse_broken_nodes(self.node_size, cfg.parallel.ep)


@plain_dataclass(frozen=True)
class TwoStepLayout:
    """hops: in order of dispatch. held: the tokens that the last one brings."""

    hops: list[Hop]
    held: Held


@DISPATCHERS.register("two_step", TwoStepOptions)
class TwoStepDispatcher(Dispatcher[TwoStepLayout]):
    """Nodes are consecutive ranks of the group. The experts apply the weights, which travel with the tokens.

    A hop in which no token would leave its rank is left out: the first where all ranks are one node, the second where
    each is a node of its own.
    """

    def __init__(self, options: TwoStepOptions, n_experts: int, group: Group, etp_group: Group) -> None:
        if group is None:
            raise ValueError("the two_step dispatcher needs the process group of the expert parallel ranks")
        _refuse_broken_nodes(options.node_size, group.size())
        super().__init__(n_experts, group, etp_group)
        self.rank, self.n_local = group.rank(), n_experts // group.size()
        self.node_size = min(options.node_size, group.size())
        self.nodes = group.size() // self.node_size

    def layout(self, routing: Routing) -> TwoStepLayout:
        token_A, expert_A, _ = routing.assignments()
        n_tokens, hops = routing.n_tokens, []
        if self.nodes > 1:
            node_A = expert_A // (self.n_local * self.node_size)
            to_A = node_A * self.node_size + self.rank % self.node_size
            hop, token_A, expert_A, n_tokens = plan_hop(token_A, expert_A, to_A, n_tokens, self.group)
            hops.append(hop)
        if self.node_size > 1:
            hop, token_A, expert_A, n_tokens = plan_hop(
                token_A, expert_A, expert_A // self.n_local, n_tokens, self.group
            )
            hops.append(hop)
        local_A = expert_A - self.rank * self.n_local
        return TwoStepLayout(hops, held.hold(token_A, local_A, n_tokens, self.n_local, self.etp_group))

    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[TwoStepLayout]) -> Payload:
        return x_TD, plan.weight_A

    def dispatch_communicate(self, payload: Payload, plan: Plan[TwoStepLayout]) -> Payload:
        x_ND, weight_A = payload
        for hop in plan.layout.hops:
            x_ND, weight_A = there(x_ND, weight_A, hop, self.group)
        return held.gather(x_ND, weight_A, plan.layout.held, self.etp_group)

    def dispatch_postprocess(self, payload: Payload, plan: Plan[TwoStepLayout]) -> Rows:
        x_ND, weight_A = payload
        return held.rows(x_ND, weight_A, plan.layout.held)

    def combine_preprocess(self, y_RD: Tensor, plan: Plan[TwoStepLayout]) -> Tensor:
        return held.sum_per_token(y_RD, plan.layout.held)

    def combine_communicate(self, y_ND: Tensor, plan: Plan[TwoStepLayout]) -> Pending:
        pending = held.start_scatter(y_ND, plan.layout.held, self.etp_group)
        for hop in reversed(plan.layout.hops):
            pending = start_back(pending.wait(), hop, self.group)
        return pending

    def combine_postprocess(self, y_TD: Tensor, plan: Plan[TwoStepLayout]) -> Tensor:
        return y_TD


def _refuse_broken_nodes(node_size: int, ep: int) -> None:
    if ep > node_size and ep % node_size:
        divisors = [n for n in range(1, ep + 1) if ep % n == 0]
        below, above = max(n for n in divisors if n < node_size), min(n for n in divisors if n > node_size)
        raise ConfigError(
            f"dispatch.node_size={node_size} must divide parallel.ep={ep}, so that every node has as many ranks; "
            f"nearest legal: dispatch.node_size={below} or dispatch.node_size={above}"
        )
