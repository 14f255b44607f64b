"""Fully sharded sparse data parallelism (Hecate, arXiv 2502.02581): hot experts are copied anew for each step."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, NonNegative, Positive
from moetrain.config.registry import PLACEMENTS
from moetrain.moe.placement import Policy, plan
from moetrain.moe.placement.plan import Homes, Loads, Placement, Topology


@dataclass(config=STRICT)
class FssdpOptions:
    """Copies of hot experts for each step, by the mean loads of the last five; homes that even out the rest."""

    slots: NonNegative = Field(default=2, description="free places of a rank in each layer, for copies; 0: plain ep")
    budget: Positive | None = Field(
        default=None, description="experts of a layer that may be copied: as many as travel unseen; null: slots"
    )
    node_size: Positive = Field(default=8, description="expert parallel ranks of one node: those with fast links")
    reshard_every: NonNegative = Field(
        default=100, description="steps after which homes are planned anew over all layers; 0: never"
    )
    rematerialise: bool = Field(
        default=False, description="free copies after forward and bring them again in backward: less memory, more bytes"
    )
    calibrate: bool = Field(
        default=False, description="add copies in slots left free once the real loads are known, where that pays"
    )
    calibrate_rows: float = Field(
        default=0.0, ge=0, description="what such a copy costs, in rows that a rank computes in the time it takes"
    )

    @property
    def hot(self) -> int:
        """Experts of a layer that are copied at most."""
        return 0 if self.slots == 0 else self.slots if self.budget is None else self.budget


@PLACEMENTS.register("fssdp", FssdpOptions)
class Fssdp(Policy):
    """Algorithms 1 and 2 of the paper."""

    options: FssdpOptions

    def __init__(self, options: FssdpOptions, topology: Topology) -> None:
        super().__init__(options, topology)
        self.calibrates, self.frees = options.calibrate and options.slots > 0, options.rematerialise

    def place(self, homes: Homes, loads: Loads) -> Placement:
        o = self.options
        return plan.fssdp(homes, loads, o.slots, o.hot, self.topology)

    def calibrate(self, homes: Homes, placement: Placement, counts_RE: Sequence[Sequence[int]]) -> Placement:
        o = self.options
        return plan.calibrate(homes, placement, counts_RE, o.slots, o.calibrate_rows, self.topology)

    def rehome(self, step: int, homes: list[Homes], loads_LE: Sequence[Loads]) -> list[Homes]:
        o = self.options
        if o.slots == 0 or o.reshard_every == 0 or step % o.reshard_every or not any(map(any, loads_LE)):
            return homes
        return plan.heterogeneous_homes(loads_LE, o.hot, self.topology)
