"""DoReMi (arXiv 2305.10429) in the run itself: more of the domains that lag most behind a reference model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
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
class DoremiOptions(MixerOptions):
    """DoReMi-style weights (arXiv 2305.10429): excess losses over those of a reference model."""

    reference: dict[str, Annotated[float, Ge(0)]] | None = Field(
        default=None, description="domain -> held-out loss of the reference model, in nats per token"
    )
    reference_run: str | None = Field(
        default=None, description="or a finished run directory, whose last evaluation becomes the reference"
    )
    every: Positive = Field(default=10, description="steps between updates")
    eta: float = Field(default=1.0, gt=0, description="step size of the exponentiated gradient")
    smoothing: float = Field(default=1e-3, ge=0, lt=1, description="share of uniform weights that is mixed in")

    def check(self, cfg: Config) -> None:
        MixerOptions.check(self, cfg)
        if self.reference is not None and self.reference_run is not None:
            raise ConfigError(
                "mixer=doremi takes mixer.reference or mixer.reference_run, not both (a run keeps the losses that it "
                "began with as mixer.reference); set one of them to null"
            )
        if self.reference_run is not None and self.text != "held_out":
            raise ConfigError("mixer.reference_run has losses on held-out text; set mixer.text=held_out")
        if self.reference_run is not None:
            self._take(Path(self.reference_run), cfg)
        if cfg.data.sources:
            refuse_unknown("mixer.reference", list(self.reference or {}), domains_in(cfg))

    def _take(self, folder: Path, cfg: Config) -> None:
        """Put the losses of the run in ``folder`` in its place, so that what becomes of it later does not matter.
        Raises ConfigError: not finished, or it measured on windows of another length or number than ``cfg`` does."""
        from moetrain.config.files import read

        try:
            losses = dict(json.loads((folder / "summary.json").read_text())["val_loss_by_domain"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"mixer.reference_run={folder} is not the directory of a finished run") from None
        theirs, sequences = read(folder / "config.yaml").train, self.sequences or cfg.train.eval_sequences
        for name, mine, other in (
            ("train.seq_len", cfg.train.seq_len, theirs.seq_len),
            ("mixer.sequences", sequences, theirs.eval_sequences),
        ):
            if mine != other:
                raise ConfigError(
                    f"{name} is {mine}, but mixer.reference_run={folder} was evaluated with {other}: losses on other "
                    "windows cannot be compared"
                )
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise ConfigError(f"mixer.reference_run={folder}: its loss of '{name}' is {loss}; take another run")
        known = domains_in(cfg) if cfg.data.sources else losses
        self.reference = {name: float(loss) for name, loss in losses.items() if name in known}
        self.reference_run, self.sequences = None, sequences or None


@MIXERS.register("doremi", DoremiOptions)
class Doremi(Mixer):
    """Every ``every`` steps (algorithm 1 of the paper): alpha_i <- alpha_i * exp(eta * max(L_i - reference_i, 0)),
    normalised, then alpha <- (1 - c) alpha + c/k.

    "Style", because the paper clips the excess of every token and updates in every step from the step's own batch; here
    it is the mean excess of a domain, measured apart. The paper's result is the mean of the weights over the run, for
    another model: it is in the metrics as ``mean``.
    """

    options: DoremiOptions

    def __init__(self, options: DoremiOptions, domains: Sequence[str], seed: int) -> None:
        super().__init__(options, domains, seed)
        if options.reference is None:
            raise ConfigError(
                "mixer=doremi needs the losses of a reference model: set mixer.reference_run to a finished run's "
                "directory, or mixer.reference to {domain: loss}"
            )
        self.reference = options.reference
        missing = [name for name in self.domains if name not in self.reference]
        if missing:
            raise ConfigError(f"mixer.reference has no loss of {', '.join(missing)}; every trained domain needs one")
        self.weights: dict[str, float] = {}
        self.sums = dict.fromkeys(self.domains, 0.0)
        self.updates = 0

    def start(self, prior: Mapping[str, float]) -> Decision:
        self.weights = dict(prior)
        return Decision(self.weights, self.options.every)

    def decide(self, seen: Observation) -> Decision:
        o, k = self.options, len(self.domains)
        excess = {name: max(seen.losses[name] - self.reference[name], 0.0) for name in self.domains}
        raised = exponentiated(self.weights, excess, o.eta)
        self.weights = {name: (1 - o.smoothing) * raised[name] + o.smoothing / k for name in self.domains}
        self.sums = {name: self.sums[name] + self.weights[name] for name in self.domains}
        self.updates += 1
        mean = {name: total / self.updates for name, total in self.sums.items()}
        return Decision(self.weights, o.every, {"excess": excess, "mean": mean})

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights, "sums": self.sums, "updates": self.updates}

    def load_state(self, state: dict[str, Any]) -> None:
        self.weights, self.sums, self.updates = dict(state["weights"]), dict(state["sums"]), state["updates"]

    def cost(self) -> Cost:
        return Cost(self.options.every, evaluations=1)
