"""What a sweep varies: its words, in order, each as it is or an axis with a range of values, by Hydra's grammar.

``a=1,2``, ``choice(...)``, ``range(...)`` and ``glob(...)`` over presets are single values; ``interval(low,high)`` is
all between, ``int(interval(...))`` whole numbers only, ``tag(log,interval(...))`` evenly in the logarithm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from moetrain.config.errors import ConfigError
from moetrain.config.presets import Presets, parse, sweep_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value: TypeAlias = str | int | float


@dataclass(frozen=True)
class Axis:
    """One key that is swept. values: the single values as words have them; empty for an interval, ``low`` to ``high``,
    of whole numbers where these are."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def ordered(self) -> bool:
        """Whether the single values are numbers that ascend, so that near places mean near values."""
        try:
            numbers = [float(value) for value in self.values]
        except ValueError:
            return False
        return all(a < b for a, b in itertools.pairwise(numbers))

    def words(self) -> list[str]:
        """A word for each single value; of an interval for both ends."""
        return [f"{self.key}={value}" for value in self.values or (self.low, self.high)]

    def distribution(self) -> BaseDistribution:
        """What Optuna draws from: places of ordered values, names of others, numbers of an interval."""
        from optuna import distributions

        if self.ordered and self.values:
            return distributions.IntDistribution(0, len(self.values) - 1)
        if self.values:
            return distributions.CategoricalDistribution(self.values)
        if isinstance(self.low, int):
            return distributions.IntDistribution(self.low, int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)

    def word(self, drawn: Any) -> str:
        """The word for what Optuna drew."""
        return f"{self.key}={self.values[drawn] if self.values and self.ordered else drawn}"

    def drawn(self, words: Sequence[str]) -> Value:
        """What Optuna would have drawn for the word of this key among ``words``. Raises ConfigError."""
        text = next((word.partition("=")[2] for word in words if word.startswith(f"{self.key}=")), None)
        try:
            if text is None or (self.values and text not in self.values):
                raise ValueError
            if self.values:
                return self.values.index(text) if self.ordered else text
            return int(text) if isinstance(self.low, int) else float(text)
        except ValueError:
            raise ConfigError(f"sweep.yaml: {self.key}={text} is not in the range of the sweep") from None


Space: TypeAlias = list[str | Axis]


def space_of(words: Sequence[str], config_dirs: Sequence[str]) -> Space:
    """``words`` with those that sweep as axes. Raises ConfigError."""
    from hydra.core.override_parser.types import IntervalSweep

    groups = Presets.find(config_dirs).groups()
    space: Space = []
    for override in parse(words):
        key = override.get_key_element()
        if not override.is_sweep_override():
            if any(axis.key == key for axis in axes(space)):
                raise ConfigError(
                    f"'{override.input_line}' comes after {key} is swept, and takes its place in every run; "
                    f"take one of the two out"
                )
            space.append(str(override.input_line))
        elif key.startswith("sweep."):
            raise ConfigError(f"'{override.input_line}': settings of the sweep itself cannot be swept")
        elif key == "run_dir":
            raise ConfigError(f"'{override.input_line}': run_dir is the folder of the whole sweep; give one")
        elif isinstance(value := override.value(), IntervalSweep):
            space.append(_interval(str(override.input_line), key, value))
        else:
            values = sweep_values(override, groups)
            twice = next((one for one in values if values.count(one) > 1), None)
            if twice is not None:
                raise ConfigError(f"'{override.input_line}' has {twice} twice; the same run would be made again")
            space.append(Axis(key, tuple(values)))
    keys = [axis.key for axis in axes(space)]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key} is swept twice; put its values in one word")
    return space


def _interval(text: str, key: str, sweep: Any) -> Axis:
    unknown = sweep.tags - {"log"}
    if unknown:
        raise ConfigError(f"'{text}': the tag {sorted(unknown)[0]} means nothing here; known: log")
    if not sweep.start < sweep.end:
        raise ConfigError(
            f"'{text}': the interval starts at {sweep.start} and ends at {sweep.end}; put the lower first"
        )
    if "log" in sweep.tags and sweep.start <= 0:
        raise ConfigError(f"'{text}': a logarithmic interval starts above 0")
    return Axis(key, low=sweep.start, high=sweep.end, log="log" in sweep.tags)


def axes(space: Space) -> list[Axis]:
    """What is swept."""
    return [part for part in space if isinstance(part, Axis)]


def combinations(space: Space) -> Iterator[list[str]]:
    """Every combination, the last key varying fastest. Raises ConfigError for an interval."""
    for axis in axes(space):
        if not axis.values:
            raise ConfigError(
                f"{axis.key} is swept over an interval, which sweep.sampler=grid has no end of; use "
                f"sweep.sampler=random or tpe, or list values: {axis.key}=choice(...)"
            )
    for combination in itertools.product(*([part] if isinstance(part, str) else part.words() for part in space)):
        yield list(combination)


def corners(space: Space) -> Iterator[list[str]]:
    """The first value of every axis, then each other value (of an interval the other end) with the rest at its first:
    what is checked ahead of a sweep that cannot be listed."""
    first = [part if isinstance(part, str) else part.words()[0] for part in space]
    yield first
    for place, part in enumerate(space):
        if isinstance(part, Axis):
            for word in part.words()[1:]:
                yield [*first[:place], word, *first[place + 1 :]]
