"""Mixers change the weights of the domains while a run goes on. One file per method.

A mixer is a small deterministic state machine that knows no model: it decides on weights for a number of steps; when
these are over it is told what was measured, and decides again. What it tries out (probes on other mixtures) is only a
decision like any other. The trainer measures, and puts weights in force (``train.mixing``). A new method is one new
file here and one preset in configs/mixer/.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, NonNegative, Positive
from moetrain.config.presets import nearest
from moetrain.config.registry import MIXERS
from moetrain.config.schema import Config
from moetrain.data.sampler import Sampler

GRID = 1_000_000  # weights are put in force as multiples of one millionth


@dataclasses.dataclass(frozen=True)
class Decision:
    """``weights`` (domain -> share, any positive scale) for the next ``steps`` steps; 0: measure before going on.

    ``notes``: what led to it, for the metrics: numbers, lists and mappings of them.
    """

    weights: Mapping[str, float]
    steps: int
    notes: dict[str, Any] = field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What was measured when the steps of a decision were over, the same on all ranks.

    ``left``: steps that the run still has. ``losses``: domain -> mean loss in nats per token. ``products``: domain ->
    inner product of its gradient with that of the target, of the whole model, both clipped to ``train.clip_norm``.
    ``cosines``: the same, divided by both norms. Only what ``Mixer.wants`` names is there.
    """

    left: int
    losses: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[str, float] = field(default_factory=dict)
    cosines: Mapping[str, float] = field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a mixer takes of every ``steps`` steps: ``probes`` of them are trained on other mixtures than it holds
    best; losses of all domains are measured ``evaluations`` times, and gradients of all domains and of the target
    ``gradients`` times."""

    steps: int
    probes: int = 0
    evaluations: int = 0
    gradients: int = 0


@dataclass(config=STRICT)
class MixerOptions:
    """Options that every mixer has."""

    start_step: NonNegative = Field(default=0, description="steps on the weights of the config before the mixer begins")
    sequences: Positive | None = Field(
        default=None,
        description="sequences that are measured: per source for losses (null: train.eval_sequences), per domain for "
        "gradients (null: train.global_batch)",
    )
    text: Literal["held_out", "train"] = Field(
        default="held_out", description="text on which losses, and the target's gradient, are measured"
    )

    def check(self, cfg: Config) -> None:
        """Raises ConfigError where the options do not fit the rest of the config."""
        if cfg.data.schedule:
            raise ConfigError(
                "a mixer decides on the weights, so data.schedule must be empty; remove it, or set mixer=none"
            )


class Mixer(ABC):
    """Base of all methods. Built as ``Method(options, domains, seed)``.

    ``domains``: those that are trained on. Raises ConfigError for options that do not fit them.
    """

    wants: ClassVar[Literal["losses", "gradients"]] = "losses"

    def __init__(self, options: Any, domains: Sequence[str], seed: int) -> None:
        self.options, self.domains, self.seed = options, list(domains), seed

    @abstractmethod
    def start(self, prior: Mapping[str, float]) -> Decision:
        """The first decision. ``prior``: the shares of the config, positive, summing to 1."""

    @abstractmethod
    def decide(self, seen: Observation) -> Decision:
        """The next decision; of one step at least."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that later decisions depend on, as JSON has it."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` gave."""

    @abstractmethod
    def cost(self) -> Cost:
        """What it takes in the long run."""

    def first(self) -> int:
        """Steps after the start until it first knows better weights than it began with."""
        return self.cost().steps

    def named(self, values: Sequence[float]) -> dict[str, float]:
        """``values`` in the order of ``domains``, by name."""
        return dict(zip(self.domains, map(float, values), strict=True))


def build_mixer(cfg: Config, sampler: Sampler) -> Mixer | None:
    """The mixer of ``cfg`` over the domains that have weight at the start of the run; None where it has none. Raises
    ConfigError."""
    entry = MIXERS.entry_of(cfg.mixer)
    if entry.name == "none":
        return None
    shares = sampler.domain_weights(0)
    domains = [name for name, share in shares.items() if share > 0]
    if len(domains) < 2:
        raise ConfigError(f"mixer={entry.name} needs two domains with weight or more; there is {', '.join(domains)}")
    mixer: Mixer = entry.build(cfg.mixer, domains, cfg.seed)
    first, steps = cfg.mixer.start_step + mixer.first(), cfg.train.steps
    if first >= steps:
        raise ConfigError(
            f"mixer={entry.name} would first change the weights at step {first}, which train.steps={steps} does not "
            "reach; lower its numbers of steps (mixer.every, mixer.start_step, probes), or train for longer"
        )
    return mixer


def exponentiated(weights: Mapping[str, float], scores: Mapping[str, float], eta: float) -> dict[str, float]:
    """One step of exponentiated gradient ascent (mirror descent on the simplex): weights * exp(eta * scores), summing
    to 1."""
    top = max(eta * scores[name] for name in weights)
    raised = {name: weight * math.exp(eta * scores[name] - top) for name, weight in weights.items()}
    total = sum(raised.values())
    return {name: value / total for name, value in raised.items()}


def on_grid(weights: Mapping[str, float]) -> dict[str, float]:
    """``weights`` as multiples of 1e-6 that sum to 1 (largest remainders; ties by name), so that rounding, which
    differs from mapping to mapping, seldom reaches the data."""
    total = sum(weights.values())
    exact = {name: weight / total * GRID for name, weight in weights.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    missing = GRID - sum(whole.values())
    for name in sorted(exact, key=lambda name: (whole[name] - exact[name], name))[:missing]:
        whole[name] += 1
    return {name: value / GRID for name, value in whole.items()}


def domains_in(cfg: Config) -> list[str]:
    """The domains of ``cfg.data``."""
    return list(dict.fromkeys(source.domain or name for name, source in cfg.data.sources.items()))


def refuse_unknown(where: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError for the first of ``names`` that is not among ``known``."""
    for name in names:
        if name not in known:
            raise ConfigError(f"{where} names '{name}', which is no domain of the data; {nearest(name, known)}")
