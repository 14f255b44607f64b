"""Dynamic gradient alignment (arXiv 2410.02498): more of the domains whose gradients point where the target's does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import MIXERS
from moetrain.config.schema import Config
from moetrain.mixture.online import (
    Cost,
    Decision,
    Mixer,
    MixerOptions,
    Observation,
    domains_in,
    exponentiated,
    refuse_unknown,
)


@dataclass(config=STRICT)
class DgaOptions(MixerOptions):
    """Dynamic gradient alignment (arXiv 2410.02498) with a target set."""

    target: list[str] | None = Field(
        default=None,
        description="domains or sources whose loss is to fall, in equal parts; weight 0 is allowed; null: all trained",
    )
    every: Positive = Field(default=100, description="steps between updates")
    eta: float = Field(default=1.0, gt=0, description="step size of mirror descent")
    ema: float = Field(default=0.0, ge=0, lt=1, description="share of the weights before that is kept in force")
    cosine: bool = Field(default=False, description="cosines instead of inner products, so that eta has no unit")

    def check(self, cfg: Config) -> None:
        MixerOptions.check(self, cfg)
        if cfg.parallel.engine != "torch":
            raise ConfigError("mixer=dga compares gradients, which parallel.engine=deepspeed does not keep; use torch")
        if self.target is not None and not self.target:
            raise ConfigError("mixer.target is empty; name a domain or a source, or null for all domains")
        if cfg.data.sources:
            refuse_unknown("mixer.target", self.target or [], [*domains_in(cfg), *cfg.data.sources])
        n, most = self.sequences, cfg.train.global_batch
        if n is not None and n > most:
            raise ConfigError(f"mixer.sequences={n} is more than train.global_batch={most}, the most for a gradient")
        if len(self.target or []) > (n or most):
            raise ConfigError(
                f"mixer.target has {len(self.target or [])} names for the {n or most} sequences of its gradient; raise "
                "mixer.sequences"
            )


@MIXERS.register("dga", DgaOptions)
class Dga(Mixer):
    """Algorithm 1 of the paper: every ``every`` steps alpha_i <- alpha_i * exp(eta * <grad L(D_i), grad L(target)>),
    normalised; the gradients are of one batch each. With ``ema``, what is in force is the moving average of alpha."""

    wants = "gradients"
    options: DgaOptions

    def __init__(self, options: DgaOptions, domains: Sequence[str], seed: int) -> None:
        super().__init__(options, domains, seed)
        self.weights: dict[str, float] = {}
        self.average: dict[str, float] = {}

    def start(self, prior: Mapping[str, float]) -> Decision:
        self.weights, self.average = dict(prior), dict(prior)
        return Decision(self.average, self.options.every)

    def decide(self, seen: Observation) -> Decision:
        o = self.options
        scores = seen.cosines if o.cosine else seen.products
        self.weights = exponentiated(self.weights, scores, o.eta)
        self.average = {n: o.ema * self.average[n] + (1 - o.ema) * self.weights[n] for n in self.domains}
        return Decision(self.average, o.every, {"products": dict(seen.products), "cosines": dict(seen.cosines)})

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights, "average": self.average}

    def load_state(self, state: dict[str, Any]) -> None:
        self.weights, self.average = dict(state["weights"]), dict(state["average"])

    def cost(self) -> Cost:
        return Cost(self.options.every, gradients=1)
