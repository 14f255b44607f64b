"""Every expert on a fixed number of ranks, whatever the loads."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import PLACEMENTS
from moetrain.moe.placement import Policy, plan
from moetrain.moe.placement.plan import Homes, Loads, Placement


@dataclass(config=STRICT)
class StaticOptions:
    """The same copies in every step; their weights are brought anew each time."""

    copies: Positive = Field(default=2, description="ranks that hold an expert, its home among them")
    node_size: Positive = Field(default=8, description="expert parallel ranks of one node: those with fast links")


@PLACEMENTS.register("static", StaticOptions)
class Static(Policy):
    """Looks at no loads."""

    options: StaticOptions

    def place(self, homes: Homes, loads: Loads) -> Placement:
        return plan.static(homes, self.options.copies, self.topology)
