"""Shadows of hot experts on every rank, while that pays (after FasterMoE, PPoPP 2022)."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, NonNegative
from moetrain.config.registry import PLACEMENTS
from moetrain.moe.placement import Policy, plan
from moetrain.moe.placement.plan import Homes, Loads, Placement


@dataclass(config=STRICT)
class ShadowOptions:
    """Hot experts on all ranks for a step, each if the rows that the busiest rank is spared outweigh its cost."""

    slots: NonNegative = Field(default=2, description="shadows of a layer at most")
    cost_rows: float = Field(
        default=0.0, ge=0, description="what a shadow costs, in rows that a rank computes in the time it takes"
    )


@PLACEMENTS.register("shadow", ShadowOptions)
class Shadow(Policy):
    """Decided by predicted loads."""

    options: ShadowOptions

    def place(self, homes: Homes, loads: Loads) -> Placement:
        return plan.shadow(homes, loads, self.options.slots, self.options.cost_rows, self.topology)
