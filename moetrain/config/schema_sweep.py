"""The sweep group of the schema (see ``schema.py``): what ``moetrain train -m`` runs. docs/sweeps.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT, NonNegative, Positive


@dataclass(config=STRICT)
class SweepConfig:
    """Which runs 'moetrain train -m' makes, and where; one run by itself reads none of it."""

    sampler: Literal["grid", "random", "tpe"] = Field(
        default="grid", description="how runs are chosen: every combination, by chance, or by Optuna from those before"
    )
    trials: int | None = Field(default=None, ge=1, description="random and tpe: how many runs; null: 20")
    metric: str = Field(
        default="val_loss",
        min_length=1,
        description="figure of metrics.jsonl that decides, its last value; NAME/KEY for one inside",
    )
    goal: Literal["min", "max"] = Field(default="min", description="whether a low or a high metric is good")
    prune: Literal["none", "median", "halving"] = Field(
        default="none",
        description="stop a bad run early: one worse than the median at its step, or successive halving (thirds)",
    )
    prune_after: int | None = Field(
        default=None, ge=1, description="steps before which none is pruned; null: a quarter of train.steps"
    )
    launcher: Literal["basic", "joblib", "slurm", "submitit_local"] = Field(
        default="basic",
        description="one run after the other here, several at once here, each a Slurm job (launch.*), or such jobs "
        "without Slurm, to try them",
    )
    jobs: Positive = Field(default=1, description="runs at a time; not for launcher=basic")
    seed: NonNegative = Field(default=0, description="seed of random and tpe")
    params: dict[str, str] = Field(
        default_factory=dict,
        description="keys that are swept, for presets: {optim.lr: 'tag(log,interval(1e-4,1e-2))'}; words win",
    )
