"""Plain expert parallelism: rank r of n holds experts [r*E/n, (r+1)*E/n), and nobody else does."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT
from moetrain.config.registry import PLACEMENTS
from moetrain.moe.placement import Policy


@dataclass(config=STRICT)
class EpOptions:
    """Every expert on one rank, as its number says."""


@PLACEMENTS.register("ep", EpOptions)
class Ep(Policy):
    """Nothing ever moves."""
