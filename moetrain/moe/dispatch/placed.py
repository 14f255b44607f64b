"""All-to-all for experts that several ranks hold: each row goes to one rank that has its expert's weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.comm import Group, all_gather_ints, all_to_all
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher, AllToAllLayout, AllToAllOptions
from moetrain.moe.permute import count, inverse, order_by_expert
from moetrain.moe.placement.plan import Placement, Topology, server, serving, slots
from moetrain.moe.routing import Routing


class PlacedDispatcher(AllToAllDispatcher):
    """Made for one placement of a layer's experts, which every rank knows. Only the layout differs from all-to-all.

    A rank's slots are the experts that it holds, ascending. A row is served by this rank if it can, else by one of its
    node, else by any; a rank spreads an expert's rows evenly over those that may (``plan.serving``).

    calibrate: given the rows of each rank for each expert, another dispatcher that lays them out, or None for this one.
    """

    def __init__(self, n_experts: int, group: Group, placement: Placement, topology: Topology) -> None:
        super().__init__(AllToAllOptions(), n_experts, group, None)
        assert group is not None
        self.calibrate: Callable[[list[list[int]]], PlacedDispatcher | None] | None = None
        rank = group.rank()
        slot_of, self.slots = slots(placement, topology.ranks)
        first = list(itertools.accumulate(self.slots, initial=0))
        # slot_EM[e, i]: the slot, numbered over all ranks, that serves every M-th row of expert e from the i-th on.
        serve = serving(placement, rank, topology)
        width = max(map(len, serve))
        ranks = [[server(choice, rank, i) for i in range(len(choice))] for choice in serve]
        rows = [[first[r] + slot_of[e, r] for r in choice] for e, choice in enumerate(ranks)]
        self.slot_EM = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        self.choices_E = torch.tensor([len(row) for row in rows])

    def layout(self, routing: Routing) -> AllToAllLayout:
        token_A, expert_A, _ = routing.assignments()
        if self.calibrate is not None:
            mine = count(expert_A, self.n_experts).tolist()
            other = self.calibrate(all_gather_ints(mine, self.group, expert_A.device))
            if other is not None:
                return other.layout(routing)
        slot_A = self._slots_of(expert_A)
        order = order_by_expert(token_A, slot_A, routing.n_tokens)
        n, own = self.size, self.slots[self.rank]
        mine_S = count(slot_A, sum(self.slots))
        theirs_ns = all_to_all(mine_S, [own] * n, self.slots, self.group).view(n, own)
        # One transfer to the host for both.
        both = torch.cat([mine_S, theirs_ns.view(-1)]).tolist()
        mine, theirs = both[: len(mine_S)], both[len(mine_S) :]
        held_here = [theirs[i * own : (i + 1) * own] for i in range(n)]
        rows = sum(theirs)
        slot_ns = torch.arange(own, device=slot_A.device).expand(n, own)
        slot_R = slot_ns.reshape(-1).repeat_interleave(theirs_ns.reshape(-1), output_size=rows)
        by_expert_R = slot_R.argsort(stable=True)
        ends = [sum(self.slots[: r + 1]) for r in range(n)]
        return AllToAllLayout(
            order=order,
            send=[sum(mine[end - slots : end]) for end, slots in zip(ends, self.slots, strict=True)],
            receive=[sum(counts) for counts in held_here],
            held=[rows],
            counts=[sum(counts) for counts in zip(*held_here, strict=True)],
            by_expert_R=by_expert_R,
            by_source_R=inverse(by_expert_R),
        )

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        assert self.group is not None
        return self.group.rank()

    def _slots_of(self, expert_A: Tensor) -> Tensor:
        """The slot that serves each assignment."""
        by_expert_A = expert_A.argsort(stable=True)
        counts_E = count(expert_A, self.n_experts)
        start_E = counts_E.cumsum(0) - counts_E
        nth = torch.arange(len(expert_A), device=expert_A.device) - start_E.repeat_interleave(
            counts_E, output_size=len(expert_A)
        )
        nth_A = torch.empty_like(nth).scatter_(0, by_expert_A, nth)
        self.slot_EM, self.choices_E = self.slot_EM.to(expert_A.device), self.choices_E.to(expert_A.device)
        return self.slot_EM[expert_A, nth_A % self.choices_E[expert_A]]
