"""Aioli (arXiv 2411.05735): learns during the run what a step on each domain does for the losses of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.errors import ConfigError
from moetrain.config.fields import STRICT, Positive
from moetrain.config.registry import MIXERS
from moetrain.data.order import Permutation, seed_key
from moetrain.mixture.online import Cost, Decision, Mixer, MixerOptions, Observation, exponentiated


@dataclass(config=STRICT)
class AioliOptions(MixerOptions):
    """Aioli (arXiv 2411.05735): a linear mixing law, fitted anew in every round by probes, and a step along it."""

    every: Positive = Field(default=250, description="steps of a round, its probes included")
    sweeps: Positive = Field(default=4, description="probes of each domain in a round")
    probe_steps: Positive = Field(default=4, description="steps of a probe")
    one_hot: float = Field(
        default=0.75, gt=0, le=1, description="share of the probed domain; the others share the rest"
    )
    eta: float = Field(default=0.2, gt=0, description="step size of the exponentiated gradient")
    ema: float = Field(default=0.0, ge=0, lt=1, description="share of the law of earlier rounds that is kept")


@MIXERS.register("aioli", AioliOptions)
class Aioli(Mixer):
    """The law is L_i(t+1) = L_i(t) - sum_j A_ij p_j (eq. 3 of the paper). In a round (algorithms 1 and 2):

    LearnParams: ``sweeps`` times, in a random order of the domains each, train ``probe_steps`` steps on a mixture with
    ``one_hot`` of domain j and the rest shared evenly; what L_i lost, averaged over the sweeps, is delta_ij. With the
    mixtures as the rows of W, A solves W a_i = delta_i for each row of A. A is shifted to be non-negative where it is
    not, and divided by its sum.
    Update: p_j <- p_j * exp(eta * sum_i A_ij), for the rest of the round.

    A sums to 1, so a round changes the ratio of two weights by a factor of e^eta at most. The authors' code restarts
    from uniform weights in each round where ``ema`` is on, and so never goes further than that; here, as in the
    algorithm, the weights go on from the last round's, and ``ema`` only averages A. A round whose probes would leave no
    step before the end of the run is not begun.
    """

    options: AioliOptions

    def __init__(self, options: AioliOptions, domains: Sequence[str], seed: int) -> None:
        super().__init__(options, domains, seed)
        k, o = len(self.domains), options
        self.probes = o.sweeps * k
        if self.probes * o.probe_steps >= o.every:
            raise ConfigError(
                f"mixer.every={o.every} leaves no steps beside the probes of {k} domains: {o.sweeps} sweeps x "
                f"{o.probe_steps} steps x {k} = {self.probes * o.probe_steps}; raise mixer.every or lower "
                "mixer.sweeps or mixer.probe_steps"
            )
        if o.one_hot <= 1 / k:
            raise ConfigError(f"mixer.one_hot={o.one_hot} must be more than an even share, 1/{k}, of {k} domains")
        self.weights: dict[str, float] = {}
        self.round = 0
        self.probe: int | None = None  # the one whose steps are being trained; None: none
        self.losses: list[float] = []  # before it
        self.drops_kk = np.zeros((k, k))  # what probes of domain j (column) took off the loss of domain i, summed
        self.law_kk: np.ndarray | None = None

    def start(self, prior: Mapping[str, float]) -> Decision:
        self.weights = dict(prior)
        return Decision(self.weights, 0)

    def decide(self, seen: Observation) -> Decision:
        losses = [seen.losses[name] for name in self.domains]
        if self.probe is None:
            if seen.left <= self.probes * self.options.probe_steps:
                return Decision(self.weights, seen.left)
            self.probe, self.drops_kk = 0, np.zeros_like(self.drops_kk)
        else:
            self.drops_kk[:, self._probed(self.probe)] += np.array(self.losses) - np.array(losses)
            self.probe += 1
        self.losses = losses
        if self.probe < self.probes:
            return Decision(self.named(self._mixture(self._probed(self.probe)).tolist()), self.options.probe_steps)
        return self._update()

    def state(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "round": self.round,
            "probe": self.probe,
            "losses": self.losses,
            "drops": self.drops_kk.tolist(),
            "law": None if self.law_kk is None else self.law_kk.tolist(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.weights, self.round, self.probe = dict(state["weights"]), state["round"], state["probe"]
        self.losses, self.drops_kk = list(state["losses"]), np.array(state["drops"])
        self.law_kk = None if state["law"] is None else np.array(state["law"])

    def cost(self) -> Cost:
        return Cost(self.options.every, self.probes * self.options.probe_steps, evaluations=self.probes + 1)

    def first(self) -> int:
        return self.probes * self.options.probe_steps

    def _probed(self, probe: int) -> int:
        """The domain of a probe of this round: every sweep has an order of its own."""
        sweep, place = divmod(probe, len(self.domains))
        return Permutation(len(self.domains), seed_key(self.seed, "aioli", self.round, sweep))[place]

    def _mixture(self, j: int) -> np.ndarray:
        """The mixture of a probe of domain ``j``."""
        k, one = len(self.domains), self.options.one_hot
        mixture_k = np.full(k, (1 - one) / (k - 1))
        mixture_k[j] = one
        return mixture_k

    def _update(self) -> Decision:
        o, k = self.options, len(self.domains)
        mixtures_kk = np.stack([self._mixture(j) for j in range(k)])
        found_kk = np.linalg.solve(mixtures_kk, self.drops_kk.T / (o.sweeps * o.probe_steps)).T  # per step
        law_kk = found_kk - min(0.0, found_kk.min())
        law_kk = law_kk / law_kk.sum() if law_kk.sum() > 0 else np.full((k, k), 1 / k**2)
        self.law_kk = law_kk if self.law_kk is None else (1 - o.ema) * law_kk + o.ema * self.law_kk
        gains = self.named(self.law_kk.sum(axis=0))
        self.weights = exponentiated(self.weights, gains, o.eta)
        self.round, self.probe = self.round + 1, None
        notes = {"gain": gains, "law": {n: self.named(row) for n, row in zip(self.domains, found_kk, strict=True)}}
        return Decision(self.weights, o.every - self.probes * o.probe_steps, notes)
