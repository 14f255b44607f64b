"""Dispatchers bring each token's vector to its experts, and the experts' outputs back. One file per kind.

A dispatcher has no parameters and keeps nothing between calls. Each direction has three stages, preprocess (reorder
here), communicate (collectives only, so that they can move to another stream) and postprocess (reorder there). What
they need to know of a routing, its layout, is integers only; the routing's memo keeps it, so that a recomputed block
sorts nothing and exchanges no counts again. A new kind is one new file here and one preset in configs/dispatch/.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from moetrain.comm import Group, Pending
from moetrain.config.errors import ConfigError
from moetrain.config.registry import DISPATCHERS
from moetrain.moe.options import as_options
from moetrain.moe.routing import Routing, Rows

L = TypeVar("L")
# The tensors that a dispatch sends.
Payload = tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan(Generic[L]):
    """What undoes a dispatch: its layout, and the weight of each assignment, in order of token, with gradient."""

    layout: L
    weight_A: Tensor


class Dispatcher(ABC, Generic[L]):
    """n_experts: E of the layer. group: the expert parallel ranks; rank r of n owns experts [r*E/n, (r+1)*E/n).

    etp_group: the ranks that each hold a part of the matrices of the same experts (expert tensor parallel), and
    different tokens; None where experts are whole. Outputs of the experts are then parts of a sum over these ranks.
    overlap: compute what needs no communication while the rows travel back. The model's parallel form sets it.
    """

    def __init__(self, n_experts: int, group: Group, etp_group: Group) -> None:
        self.n_experts = n_experts
        self.group = group
        self.etp_group = etp_group
        self.overlap = False

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Rows, Plan[L]]:
        """x_TD (T, D) -> the rows of the local experts, and the plan that ``combine`` needs."""
        layout = routing.memo.once("dispatch.layout", lambda: self.layout(routing))
        plan = Plan(layout, routing.flat_weights())
        payload = self.dispatch_preprocess(x_TD, plan)
        payload = self.dispatch_communicate(payload, plan)
        return self.dispatch_postprocess(payload, plan), plan

    def combine(self, y_RD: Tensor, plan: Plan[L], beside: Callable[[], Tensor | float]) -> Tensor:
        """The experts' rows -> out_TD (T, D): for each token the sum of its experts' outputs, times their weights.

        beside: gives what is added to that, (T, D) or a number. With ``overlap`` it is called, and its backward runs,
        while the rows travel.
        """
        y_RD = self.combine_preprocess(y_RD, plan)
        pending = self.combine_communicate(y_RD, plan)
        if not self.overlap:
            return self.combine_postprocess(pending.wait(), plan) + beside()
        try:
            beside_TD = beside()
        finally:  # recomputation leaves by an exception once it has all that it needs
            y_RD = pending.wait()
        return self.combine_postprocess(y_RD, plan) + beside_TD

    @abstractmethod
    def layout(self, routing: Routing) -> L:
        """The integers of a dispatch: orders, counts, splits. Exchanges counts between the ranks."""

    @abstractmethod
    def dispatch_preprocess(self, x_TD: Tensor, plan: Plan[L]) -> Payload:
        """What this rank sends, in the order of the ranks that get it."""

    @abstractmethod
    def dispatch_communicate(self, payload: Payload, plan: Plan[L]) -> Payload:
        """What this rank receives."""

    @abstractmethod
    def dispatch_postprocess(self, payload: Payload, plan: Plan[L]) -> Rows:
        """The received rows, grouped by local expert."""

    @abstractmethod
    def combine_preprocess(self, y_RD: Tensor, plan: Plan[L]) -> Tensor:
        """The experts' outputs in the order in which they go back."""

    @abstractmethod
    def combine_communicate(self, y_RD: Tensor, plan: Plan[L]) -> Pending:
        """The outputs that come back to this rank, the last collective under way."""

    @abstractmethod
    def combine_postprocess(self, y_RD: Tensor, plan: Plan[L]) -> Tensor:
        """out_TD, the outputs summed per token."""


def build_dispatcher(options: Any, n_experts: int, group: Group, etp_group: Group = None) -> Dispatcher[Any]:
    """The dispatcher that ``options`` (a registered options object, or a mapping with its ``kind``) describe.

    group: the expert parallel ranks; None where there are none. etp_group: as in Dispatcher. Layers with equally many
    experts may share one dispatcher. Raises ConfigError when the experts cannot be split evenly over the group, or the
    kind cannot serve one.
    """
    ep = 1 if group is None else group.size()
    if n_experts % ep:
        raise ConfigError(
            f"model.moe.num_experts={n_experts} experts cannot be split evenly over parallel.ep={ep} ranks; "
            f"make ep a divisor of num_experts"
        )
    options = as_options(DISPATCHERS, options)
    if etp_group is not None and etp_group.size() == 1:
        etp_group = None
    return DISPATCHERS.entry_of(options).build(options, n_experts, group, etp_group)
