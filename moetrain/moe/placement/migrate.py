"""Experts change their home as loads change, and have no copies (after SmartMoE, ATC 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import PLACEMENTS
from moetrain.moe.placement import Policy, plan
from moetrain.moe.placement.plan import Homes, Loads


@dataclass(config=STRICT)
class MigrateOptions:
    """Experts of the busiest rank swap places with lighter ones; weights and optimizer state move along."""

    every: Positive = Field(default=50, description="steps between migrations")


@PLACEMENTS.register("migrate", MigrateOptions)
class Migrate(Policy):
    """Every rank keeps as many experts of a layer."""

    options: MigrateOptions

    def rehome(self, step: int, homes: list[Homes], loads_LE: Sequence[Loads]) -> list[Homes]:
        if step % self.options.every:
            return homes
        return [plan.migrate(h, loads, self.topology) for h, loads in zip(homes, loads_LE, strict=True)]
