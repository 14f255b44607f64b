"""The faults group of the schema (see ``schema.py``): what a run does when something goes wrong. docs/faults.md."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, NonNegative, Positive


@dataclass(config=STRICT)
class SnapshotConfig:
    """State in shared memory, so that a lost rank costs fewer steps than there are between checkpoints."""

    every: NonNegative | None = Field(
        default=None,
        description="steps between snapshots, kept in shared memory here and on a neighbour's node; 0: none; null: 20 "
        "where half of the free memory is enough",
    )


@dataclass(config=STRICT)
class FaultsConfig:
    """Bad steps, lost ranks, and checks across ranks."""

    spike: float = Field(
        default=10.0,
        ge=0,
        description="a loss this many robust standard deviations above the median of the window is bad; 0: only one "
        "that is not finite",
    )
    window: Positive = Field(default=64, description="good steps that say what loss is usual; no spikes before")
    retry_after: Positive = Field(default=16, description="steps after which a skipped batch is tried again, once")
    lower_lr: float = Field(
        default=0.5, gt=0, le=1, description="factor on the learning rate after a batch was bad again"
    )
    lower_lr_steps: NonNegative = Field(default=32, description="steps for which it is lowered")
    stop_after: Positive = Field(default=8, description="bad batches in a row after which the run stops")
    checksum_every: NonNegative = Field(
        default=100, description="steps between comparisons of the weights that several ranks hold; 0: never"
    )
    restarts: NonNegative = Field(
        default=3, description="how often 'moetrain train' starts its ranks again after one died or hung"
    )
