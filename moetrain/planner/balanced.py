"""Balanced routing for a forward pass on the meta device, where no token has a value to be routed by.

Every expert gets as many rows as the others. In each stretch of E/K tokens every expert is chosen once, in random
order, so that a token's experts lie on as many ranks as chance has it; a router that is forced to balance hands them
out in turn, as it does in a run. All ranks route alike. What dispatchers plan from it is computed by their own code:
for one rank whose peers send what it sends, or, where what a rank sends depends on its place, for all ranks of the
expert group, as threads that exchange the integers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes
from moetrain.model.decoder import Decoder
from moetrain.moe.capacity import capacity, within_capacity
from moetrain.moe.dispatch import Dispatcher, Plan, build_dispatcher
from moetrain.moe.dispatch.all_gather import AllGatherOptions
from moetrain.moe.dispatch.all_to_all import AllToAllOptions
from moetrain.moe.dispatch.auto import AutoOptions
from moetrain.moe.dispatch.local import LocalOptions
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import Memo, Routing, Rows, TokenContext
from moetrain.planner.groups import MirrorGroup, SeatedGroup, Table, Traffic

# Dispatchers with which ranks that route alike send alike.
SAME_EVERYWHERE = (AutoOptions, LocalOptions, AllToAllOptions, AllGatherOptions)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a layout depends on. factor: of the capacity. forced: the router hands experts out in turn."""

    tokens: int
    top_k: int
    experts: int
    factor: float | None
    forced: bool


@dataclasses.dataclass(frozen=True)
class Laid:
    """The layout of rank 0, and what planning it sent over the groups of ep and etp."""

    layout: Any
    ep: Traffic
    etp: Traffic


class Balancer:
    """Makes the layouts of a mapping; each distinct one once."""

    def __init__(self, cfg: Config, sizes: Sizes) -> None:
        self.cfg, self.sizes = cfg, sizes
        self.lay = functools.cache(self._lay)

    def install(self, model: Decoder, credit: Callable[[str, Traffic], None]) -> None:
        """Make the MoE layers of ``model`` route in balance. credit: is told what planning sent over which group."""
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                router: Any = layer.router
                forced = getattr(getattr(router, "options", None), "force_balance", False)
                make = functools.partial(
                    Case, top_k=router.top_k, experts=router.n_experts, factor=router.capacity_factor, forced=forced
                )
                router._keep = functools.partial(_keep, make)
                layer.dispatcher = _Balanced(layer.dispatcher, make, self, credit)  # type: ignore[assignment]

    def _lay(self, case: Case) -> Laid:
        """The layout of the first rank of the expert group."""
        ep, etp = self.sizes.ep, self.sizes.etp
        if isinstance(self.cfg.dispatch, SAME_EVERYWHERE):
            groups = MirrorGroup(0, ep), MirrorGroup(0, etp)
            dispatcher = build_dispatcher(self.cfg.dispatch, case.experts, *groups)
            return Laid(dispatcher.layout(routing(case)), groups[0].traffic, groups[1].traffic)
        # Every rank plans its own; threads, since each waits for the others.
        across = [Table(ep) for _ in range(etp)]
        beside = [Table(etp) for _ in range(ep)]
        seats = [(SeatedGroup(e, ep, across[t]), SeatedGroup(t, etp, beside[e])) for e in range(ep) for t in range(etp)]
        dispatchers = [build_dispatcher(self.cfg.dispatch, case.experts, *groups) for groups in seats]
        with ThreadPoolExecutor(len(seats)) as pool:
            layouts = list(pool.map(lambda dispatcher: dispatcher.layout(routing(case)), dispatchers))
        return Laid(layouts[0], seats[0][0].traffic, seats[0][1].traffic)


class _Balanced:
    """A layer's dispatcher that finds a balanced layout, whatever the routing says."""

    def __init__(
        self,
        inner: Dispatcher[Any],
        make: Callable[..., Case],
        balancer: Balancer,
        credit: Callable[[str, Traffic], None],
    ) -> None:
        self.inner, self.make, self.balancer, self.credit = inner, make, balancer, credit
        self.combine = inner.combine

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Rows, Plan[Any]]:
        """As ``Dispatcher.dispatch``, which takes its layout from the memo."""
        routing.memo.once("dispatch.layout", lambda: self._layout(len(x_TD)))
        return self.inner.dispatch(x_TD, routing)

    def _layout(self, tokens: int) -> Any:
        laid = self.balancer.lay(self.make(tokens))
        self.credit("ep", laid.ep)
        self.credit("etp", laid.etp)
        return _on_meta(laid.layout)


def balanced_ids(case: Case) -> Tensor:
    """ids_TK on the CPU."""
    n, E = case.tokens * case.top_k, case.experts
    if case.forced:
        return (torch.arange(n) % E).view(case.tokens, case.top_k)
    generator = torch.Generator().manual_seed(0)
    rounds = torch.rand(-(-n // E), E, generator=generator).argsort(dim=1)
    return rounds.flatten()[:n].view(case.tokens, case.top_k)


def routing(case: Case) -> Routing:
    """A routing on the CPU; weights are left empty."""
    ids_TK = balanced_ids(case)
    whole = Routing(case.experts, case.tokens, Memo(), ids_TK, torch.empty(ids_TK.shape))
    if case.factor is None:
        return whole
    token_A, expert_A, weight_A = (a.index_select(0, _kept(case, ids_TK)) for a in whole.assignments())
    return Routing(case.experts, case.tokens, Memo(), token_A=token_A, expert_A=expert_A, weight_A=weight_A)


def _kept(case: Case, ids_TK: Tensor) -> Tensor:
    assert case.factor is not None
    limit = capacity(ids_TK.numel(), case.experts, case.factor)
    return within_capacity(ids_TK.flatten(), None, case.experts, limit)


def _keep(
    make: Callable[..., Case], token_A: Tensor, expert_A: Tensor, weight_A: Tensor, context: TokenContext
) -> Tensor:
    """``Router._keep`` of balanced choices."""
    case = make(0)
    case = make(len(expert_A) // case.top_k)
    return _kept(case, balanced_ids(case)).to("meta")


def _on_meta(value: Any) -> Any:
    """A layout with its tensors on the meta device, new ones for every layer."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [_on_meta(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
