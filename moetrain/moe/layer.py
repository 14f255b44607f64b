"""The MoE layer: the same four lines for every router, dispatcher, expert kind and mapping."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.routing import Carry, Routing, TokenContext


class MoELayer(nn.Module):
    """Routed experts beside shared ones. Knows no mesh: ``parallel.apply`` sets ``dispatcher`` and shards ``experts``.

    router(x_TD, carry, context) -> (Routing, Carry)
    dispatcher.dispatch(x_TD, routing) -> (Rows, plan) and dispatcher.combine(y_RD, plan, beside) -> out_TD, with
        what beside() gives added; the dispatcher may call it while rows travel
    experts(rows) -> y_RD, or the sums of each token's rows where ``rows`` asks for them
    shared(x_TD) -> out_TD, or None
    """

    def __init__(
        self, router: nn.Module, dispatcher: Dispatcher[Any], experts: nn.Module, shared: nn.Module | None
    ) -> None:
        super().__init__()
        self.router = router
        self.dispatcher = dispatcher
        self.experts = experts
        self.shared = shared

    def forward(self, x_TD: Tensor, carry: Carry, context: TokenContext) -> tuple[Tensor, Carry]:
        """x_TD (T, D) -> (out_TD, carry). ``out_TD`` does not contain the residual."""
        routing, carry = self.router(x_TD, carry, context)
        rows, plan = self.dispatcher.dispatch(x_TD, routing)
        y_RD = self.experts(rows)
        return self.dispatcher.combine(y_RD, plan, beside=lambda: self.local(x_TD, routing)), carry

    def local(self, x_TD: Tensor, routing: Routing) -> Tensor | float:
        """The share that needs no communication: shared experts, (T, D), or 0.0 where there are none."""
        return 0.0 if self.shared is None else self.shared(x_TD)
