"""The types of settings that several groups of the schema and the registries' options share."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False)

# A number of the MoE layer: one value, or one per decoder layer (entries of dense layers are ignored).
PerLayerInt = int | list[int]
PerLayerFloat = float | list[float]
# A number of the router or the balance: a constant, or {step: value} joined by straight lines, constant at both ends.
Scheduled = float | Annotated[dict[int, float], Field(min_length=1)]
# Filled from a registry; see ``schema.py``.
Kind = Any

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


def value_at(value: Scheduled, step: int) -> float:
    """``value`` at optimizer step ``step`` (0-based): the constant, or a linear interpolation between the points."""
    if not isinstance(value, dict):
        return float(value)
    points = sorted(value.items())
    if step <= points[0][0]:
        return float(points[0][1])
    for (s0, v0), (s1, v1) in itertools.pairwise(points):
        if step <= s1:
            return float(v0 + (v1 - v0) * (step - s0) / (s1 - s0))
    return float(points[-1][1])
