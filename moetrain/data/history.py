"""The weights of a run from its first sample on: which held when, and why."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Phase:
    """From sample ``first_sample`` on, sources get the shares ``weights`` of the training tokens (they sum to 1).

    ``why``: "config", "schedule", "user" (changed at a resume), "mixer NAME", or "exhausted SOURCE".
    """

    first_sample: int
    weights: dict[str, float]
    why: str


class WeightHistory:
    """Phases in the order of their first samples, which differ. Together with data and seed it decides every sample."""

    def __init__(self, phases: Iterable[Phase] = ()) -> None:
        self.phases: list[Phase] = []
        for phase in phases:
            self.append(phase)

    def append(self, phase: Phase) -> None:
        """Add a phase that begins after all others. Raises ValueError when it does not."""
        if phase.first_sample < 0 or (self.phases and phase.first_sample <= self.phases[-1].first_sample):
            raise ValueError(f"a phase that begins at sample {phase.first_sample} does not come last")
        self.phases.append(phase)

    def index(self, i: int) -> int:
        """Number of the phase that sample ``i`` belongs to."""
        return bisect_right(self.phases, i, key=lambda phase: phase.first_sample) - 1

    def at(self, i: int) -> Phase:
        """The phase that sample ``i`` belongs to."""
        return self.phases[self.index(i)]

    def begun(self, samples: int) -> WeightHistory:
        """The phases that have dealt some of the first ``samples`` samples."""
        return WeightHistory(phase for phase in self.phases if phase.first_sample < samples)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists, mappings and numbers."""
        return [asdict(phase) for phase in self.phases]

    @classmethod
    def from_json(cls, content: Iterable[dict[str, Any]]) -> WeightHistory:
        """What ``to_json`` gave. Raises ValueError, TypeError or KeyError for anything else."""
        return cls(Phase(int(p["first_sample"]), dict(p["weights"]), str(p["why"])) for p in content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightHistory) and self.phases == other.phases

    def __len__(self) -> int:
        return len(self.phases)

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)
