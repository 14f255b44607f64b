"""LSH-compressed all-to-all: similar rows of an expert travel as one (LSH-MoE, arXiv 2411.08446). Changes the function.

On the rank where tokens are, the rows of each expert are hashed into buckets (``buckets``). Only the mean c_j of bucket
j, of n_j rows, travels; the expert works on it, and a row gets back what its bucket got, plus how far it is from the
mean, which never left:

    y_k = E(c_j) + x_k - c_j        (with ``residual``; without: y_k = E(c_j))

In matrices, with S copying buckets to rows and M = diag(1/n) S^T taking means: y = S E(M x) + (1 - S M) x. Buckets are
constants (the hash has no gradient), so the backward is the adjoint of that. S M is symmetric, and for g = dL/dy

    dL/dx = M^T J^T S^T g + (1 - S M) g,     or for a row:  dL/dx_k = u_j / n_j + g_k - G_j / n_j,

G_j the sum of g over a bucket and u_j = J_E(c_j)^T G_j. So G_j is what travels back, as much as went there, and the
expert's weights get the gradient of (c_j, G_j). A bucket of one row gives the plain layer, exactly.

Every row is compressed, also one whose expert is on its own rank: so the experts' work shrinks, too. A mean holds
tokens that come later in a sequence, so a causal model sees something of what it is to predict, and its training loss
is too low. Outside training nothing is compressed: held-out losses are those of the model as it is exported.
"""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from moetrain.comm import Group, Pending
from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import DISPATCHERS
from moetrain.moe.dispatch import Dispatcher, Payload, Plan
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher, AllToAllLayout, AllToAllOptions
from moetrain.moe.dispatch.buckets import Buckets, bucket_rows, centre, copy_to_rows, mean_rows, one_each, rotations
from moetrain.moe.permute import RowOrder, gather_rows, order_by_expert, sum_rows
from moetrain.moe.routing import Memo, Routing, Rows


@dataclass(config=STRICT)
class LshOptions:
    """Of similar rows of an expert only the mean travels, while training: fewer bytes, another function."""

    hashes: Positive = Field(
        default=6, description="hashes that must all agree; more: smaller buckets, more rows sent, less error"
    )
    axes: Positive = Field(
        default=1, description="directions that a hash tells apart are twice this; more: smaller buckets"
    )
    resample: bool = Field(default=False, description="draw new rotations every step instead of once per layer")
    residual: bool = Field(
        default=True, description="add to what a row gets back how far it was from the mean of its bucket"
    )


@plain_dataclass(frozen=True)
class LshLayout:
    """order: this rank's rows by expert. buckets: of these rows. sent: the way of the buckets' means."""

    order: RowOrder
    buckets: Buckets
    sent: AllToAllLayout


@plain_dataclass(frozen=True)
class LshPlan(Plan[LshLayout]):
    """residual_RD: what stays here of each row; None without compensation. mean_JD: what travels."""

    mean_JD: Tensor
    residual_RD: Tensor | None


@DISPATCHERS.register("lsh", LshOptions)
class LshDispatcher(Dispatcher[LshLayout]):
    """Means travel as the all_to_all dispatcher's rows do; weights stay at home.

    tally: per decoder layer the sums over training steps since they were last taken: rows, rows sent, and the squared
    norms of the rows' distances from their means and of the rows; float64 (4,). Rows that are not finite are left out
    of the last two.
    """

    def __init__(self, options: LshOptions, n_experts: int, group: Group, etp_group: Group) -> None:
        if group is None:
            raise ValueError("the lsh dispatcher needs the process group of the expert parallel ranks")
        super().__init__(n_experts, group, etp_group)
        self.options = options
        self.means = AllToAllDispatcher(AllToAllOptions(), n_experts, group, etp_group)
        self.tally: dict[int, Tensor] = {}

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Rows, LshPlan]:
        """As ``Dispatcher.dispatch``; buckets, as the layout, are found once per token and step."""
        layout = routing.memo.once("dispatch.layout", lambda: self.hashed(x_TD.detach(), routing))
        x_RD = gather_rows(x_TD, layout.order)
        mean_JD = mean_rows(x_RD, layout.buckets)
        if routing.training and not x_TD.is_meta:
            routing.memo.once("lsh.tally", lambda: self._count(x_RD.detach(), mean_JD.detach(), routing.layer, layout))
        residual_RD = centre(x_RD, mean_JD, layout.buckets) if self.options.residual else None
        plan = LshPlan(layout, routing.flat_weights(), mean_JD, residual_RD)
        payload = self.dispatch_preprocess(x_TD, plan)
        payload = self.dispatch_communicate(payload, plan)
        return self.dispatch_postprocess(payload, plan), plan

    def hashed(self, x_TD: Tensor, routing: Routing) -> LshLayout:
        """The layout of these tokens: outside training that of ``layout``."""
        if not routing.training:
            return self.layout(routing)
        o, order, expert_R = self.options, *_by_expert(routing)
        rotation = rotations(x_TD.shape[1], o.hashes, o.axes, routing.step if o.resample else 0, routing.layer)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        rotation_HAD = rotation.to(x_TD.device, dtype)
        return self._laid(order, bucket_rows(gather_rows(x_TD, order), expert_R, self.n_experts, rotation_HAD))

    def layout(self, routing: Routing) -> LshLayout:
        """The layout without compression, which is the most that may travel."""
        order, expert_R = _by_expert(routing)
        return self._laid(order, one_each(expert_R))

    def _laid(self, order: RowOrder, buckets: Buckets) -> LshLayout:
        J = torch.arange(len(buckets.expert_J), device=buckets.expert_J.device)
        weight_J = torch.ones(len(J), device=J.device)  # not used: weights stay with the rows
        as_tokens = Routing(self.n_experts, len(J), Memo(), token_A=J, expert_A=buckets.expert_J, weight_A=weight_J)
        return LshLayout(order, buckets, self.means.layout(as_tokens))

    def _count(self, x_RD: Tensor, mean_JD: Tensor, layer: int, layout: LshLayout) -> None:
        x2_R, mean2_J = (t.double().square().sum(1) for t in (x_RD, mean_JD))
        x2_R, mean2_J = (t.masked_fill(~t.isfinite(), 0) for t in (x2_R, mean2_J))
        x2, rows, sent = x2_R.sum(), x2_R.new_tensor(float(len(x_RD))), x2_R.new_tensor(float(len(mean_JD)))
        error2 = (x2 - (mean2_J * layout.buckets.counts_J).sum()).clamp(min=0)
        found = torch.stack([rows, sent, error2, x2])
        self.tally[layer] = self.tally[layer] + found if layer in self.tally else found

    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[LshLayout]) -> Payload:
        assert isinstance(plan, LshPlan)
        return (plan.mean_JD,)  # in order of expert, thus of destination

    def dispatch_communicate(self, payload: Payload, plan: Plan[LshLayout]) -> Payload:
        return self.means.dispatch_communicate(payload, _way(plan))

    def dispatch_postprocess(self, payload: Payload, plan: Plan[LshLayout]) -> Rows:
        return self.means.dispatch_postprocess(payload, _way(plan))

    def combine_preprocess(self, y_RD: Tensor, plan: Plan[LshLayout]) -> Tensor:
        return self.means.combine_preprocess(y_RD, _way(plan))

    def combine_communicate(self, y_RD: Tensor, plan: Plan[LshLayout]) -> Pending:
        return self.means.combine_communicate(y_RD, _way(plan))

    def combine_postprocess(self, y_JD: Tensor, plan: Plan[LshLayout]) -> Tensor:
        assert isinstance(plan, LshPlan)
        y_RD = copy_to_rows(y_JD, plan.layout.buckets)
        if plan.residual_RD is not None:
            y_RD = y_RD + plan.residual_RD
        return sum_rows(y_RD, plan.layout.order, plan.weight_A)


def _by_expert(routing: Routing) -> tuple[RowOrder, Tensor]:
    token_A, expert_A, _ = routing.assignments()
    order = order_by_expert(token_A, expert_A, routing.n_tokens)
    return order, expert_A.index_select(0, order.assignment_R)


def _way(plan: Plan[LshLayout]) -> Plan[AllToAllLayout]:
    return Plan(plan.layout.sent, plan.weight_A)
