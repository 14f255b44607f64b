"""Skill-it (arXiv 2307.14430): more of the domains that help those whose loss is still high."""

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
class SkillItOptions(MixerOptions):
    """Skill-it (arXiv 2307.14430): weights from a graph of what helps what, and the losses."""

    graph: dict[str, dict[str, float]] | None = Field(
        default=None,
        description="graph.A.B: share of B's loss that training on A alone takes off; null: learnt by probes",
    )
    probe_steps: Positive = Field(default=100, description="without a graph: steps on each domain alone, at the start")
    every: Positive = Field(default=400, description="steps between updates")
    eta: float = Field(default=0.2, gt=0, description="step size")
    window: Positive = Field(default=3, description="last evaluations whose losses are summed")

    def check(self, cfg: Config) -> None:
        MixerOptions.check(self, cfg)
        if self.graph is not None and cfg.data.sources:
            names = [*self.graph, *(name for row in self.graph.values() for name in row)]
            refuse_unknown("mixer.graph", names, domains_in(cfg))


@MIXERS.register("skill_it", SkillItOptions)
class SkillIt(Mixer):
    """At each update (algorithm 1 of the paper) p_i = prior_i * exp(eta * sum_j A_ij * (sum of the last ``window``
    losses of j)), normalised: not from the weights before, but from the prior, which is uniform in the paper. Before
    any loss is known, losses are taken as 1.

    A_ij is the share of j's loss that training on i alone takes off. The paper learns it in runs of their own that all
    begin with the same model; here, without a ``graph``, by steps on each domain alone at the start, one domain after
    the other, so later ones start from a better model. What makes a loss worse counts as 0.
    """

    options: SkillItOptions

    def __init__(self, options: SkillItOptions, domains: Sequence[str], seed: int) -> None:
        super().__init__(options, domains, seed)
        self.prior: dict[str, float] = {}
        self.past: list[dict[str, float]] = []  # losses of the last evaluations
        self.probe: int | None = None  # the domain that is being probed
        self.graph: dict[str, dict[str, float]] = {}
        if options.graph is not None:
            for name in self.domains:
                missing = [n for n in self.domains if n not in options.graph.get(name, {})]
                if missing:
                    raise ConfigError(f"mixer.graph.{name} lacks {', '.join(missing)}; it needs every trained domain")
                self.graph[name] = {n: float(options.graph[name][n]) for n in self.domains}

    def start(self, prior: Mapping[str, float]) -> Decision:
        self.prior = dict(prior)
        if self.options.graph is None:
            return Decision(self.prior, 0)
        return self._update()

    def decide(self, seen: Observation) -> Decision:
        losses = {name: seen.losses[name] for name in self.domains}
        if len(self.graph) < len(self.domains):
            if self.probe is not None:
                before = self.past[-1]
                drops = {n: max(0.0, (before[n] - losses[n]) / before[n]) if before[n] > 0 else 0.0 for n in losses}
                self.graph[self.domains[self.probe]] = drops
            self.past = [losses]
            self.probe = len(self.graph)
            if self.probe < len(self.domains):
                one = self.domains[self.probe]
                return Decision({n: float(n == one) for n in self.domains}, self.options.probe_steps)
            self.probe = None
        else:
            self.past = [*self.past, losses][-self.options.window :]
        return self._update()

    def state(self) -> dict[str, Any]:
        return {"prior": self.prior, "past": self.past, "probe": self.probe, "graph": self.graph}

    def load_state(self, state: dict[str, Any]) -> None:
        self.prior, self.past, self.probe = dict(state["prior"]), list(state["past"]), state["probe"]
        if self.options.graph is None:
            self.graph = {name: dict(row) for name, row in state["graph"].items()}

    def cost(self) -> Cost:
        return Cost(self.options.every, evaluations=1)

    def first(self) -> int:
        return len(self.domains) * self.options.probe_steps if self.options.graph is None else 0

    def _update(self) -> Decision:
        high = {n: sum(losses[n] for losses in self.past) if self.past else 1.0 for n in self.domains}
        gains = {n: sum(self.graph[n][to] * high[to] for to in self.domains) for n in self.domains}
        notes: dict[str, Any] = {"gain": gains} | ({"graph": self.graph} if self.options.graph is None else {})
        return Decision(exponentiated(self.prior, gains, self.options.eta), self.options.every, notes)
