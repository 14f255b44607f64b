"""An online mixer at work in a run: when to measure what, and putting its weights in force.

All that is done here happens between steps and leaves the model, the optimizer, the loads of the experts and the run's
samples as they were; randomness is seeded anew by every step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from moetrain.comm.ranks import Ranks
from moetrain.config.errors import TrainError
from moetrain.config.registry import MIXERS
from moetrain.config.schema import Config
from moetrain.data.dataset import TokenData
from moetrain.data.loader import Batch, Loader, Split, held_out_windows, window_batches
from moetrain.data.order import Mixture, Permutation, seed_key
from moetrain.mixture.online import Decision, Observation, build_mixer, on_grid
from moetrain.parallel.mesh import ParallelDims
from moetrain.train.engine import Engine
from moetrain.train.evaluate import evaluate

FORWARD = 1 / 3  # of the work of forward and backward


class Mixing:
    """The mixer of a run. ``begin``: the step before which it decides first. Raises ConfigError where the mixer of
    ``cfg`` does not fit the domains that have weight."""

    def __init__(self, cfg: Config, engine: Engine, loader: Loader, dims: ParallelDims) -> None:
        self.cfg, self.engine, self.loader, self.dims = cfg, engine, loader, dims
        self.mixer = build_mixer(cfg, loader.sampler)
        self.name = MIXERS.entry_of(cfg.mixer).name
        self.until = getattr(cfg.mixer, "start_step", 0)  # the step before which the next decision is due
        self.weights: dict[str, float] | None = None  # of the domains, as the last decision put them in force
        self.inside: dict[str, float] = {}  # source -> its share of its domain

    def before_step(self, step: int, left: int) -> dict[str, Any]:
        """Called before step ``step``, after which the run has ``left`` - 1 more: measure and decide where that is due.
        Returns what to log: the new weights and what led to them; nothing where there is no decision. Collective.

        Raises TrainError when something measured is not finite.
        """
        if self.mixer is None or step < self.until:
            return {}
        began, due = time.perf_counter(), 0
        notes: dict[str, Any] = {}
        while due == 0:
            decision = self._start(step) if self.weights is None else self.mixer.decide(self._observe(step, left))
            self._put_in_force(decision)
            notes, due = notes | decision.notes, decision.steps
        self.until = step + due
        return {"mixture": self.weights, "mixer": notes, "mixer_s": time.perf_counter() - began}

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: all that later decisions depend on, as JSON has it; None before the first."""
        if self.mixer is None or self.weights is None:
            return None
        own = {"name": self.name, "domains": self.mixer.domains, "until": self.until}
        return {**own, "weights": self.weights, "inside": self.inside, "state": self.mixer.state()}

    def load_state(self, state: dict[str, Any] | None, step: int) -> list[str]:
        """Take up what ``state`` gave at step ``step``; lines that say what is not as it was. Where the mixer or the
        domains are others now, or the user has given other weights, it begins anew from the weights in force. Where
        caps are others, the weights that were decided on are put in force again: a source may have more to give."""
        if state is None:
            return []
        lines, loader = [], self.loader
        same = self._in_force(step) == self._left_of(state["weights"], state["inside"], step)
        why = loader.sampler.dealer.asked_at(loader.first_sample(step)).why
        if not same and why.startswith(("mixer", "exhausted")):
            loader.change(self._of_sources(state["weights"], state["inside"]), f"mixer {state['name']}")
            lines, same = ["caps are others now, so the weights that were decided on hold again"], True
        if self.mixer is None:
            return lines
        why = ""
        if (state["name"], state["domains"]) != (self.name, self.mixer.domains):
            why = f"this run had {state['name']} over {', '.join(state['domains'])}"
        elif not same:
            why = "the weights given now are not those that it had put in force"
        if why:
            self.until = max(step, self.until)
            return [*lines, f"{self.name} begins anew: {why}"]
        self.until, self.weights, self.inside = state["until"], dict(state["weights"]), dict(state["inside"])
        self.mixer.load_state(state["state"])
        return lines

    def describe(self) -> str:
        """What the mixer costs, for the start of a run; empty where there is none."""
        if self.mixer is None:
            return ""
        cost, t = self.mixer.cost(), self.cfg.train
        parts = [f"every {cost.steps} steps"]
        extra = 0.0
        if cost.probes:
            parts.append(f"{cost.probes} of them probes of other mixtures")
        if cost.evaluations:
            windows = sum(len(self._loss_windows(source)) for source in self.loader.data.sources)
            extra += cost.evaluations * windows * FORWARD
            parts.append(f"{cost.evaluations} evaluations of {windows} sequences")
        if cost.gradients:
            gradients = cost.gradients * (len(self.mixer.domains) + 1)
            extra += gradients * self._gradient_sequences()
            parts.append(f"{gradients} gradients of {self._gradient_sequences()} sequences")
        share = extra / (cost.steps * t.global_batch)
        return f"{self.name} over {', '.join(self.mixer.domains)}: {', '.join(parts)}; {share:.1%} more work"

    def _in_force(self, step: int) -> dict[str, float]:
        """The weights of the domains that step ``step`` is to be dealt by."""
        return self._of_domains(self.loader.sampler.history.at(self.loader.first_sample(step)).weights)

    def _left_of(self, weights: Mapping[str, float], inside: Mapping[str, float], step: int) -> dict[str, float]:
        """What a decision for ``weights`` has come to before step ``step``, since sources may have run out."""
        of_source = self._of_sources(weights, inside)
        return self._of_domains(self.loader.sampler.dealer.left_of(of_source, self.loader.first_sample(step)))

    def _of_domains(self, of_source: Mapping[str, float]) -> dict[str, float]:
        domain_of = self.loader.data.domain_of
        weights = dict.fromkeys(self.loader.data.domains, 0.0)
        for source, weight in of_source.items():
            weights[domain_of[source]] += weight
        return on_grid(weights)

    def _of_sources(self, weights: Mapping[str, float], inside: Mapping[str, float]) -> dict[str, float]:
        domain_of = self.loader.data.domain_of
        return {source: weights.get(domain, 0.0) * inside.get(source, 0.0) for source, domain in domain_of.items()}

    def _start(self, step: int) -> Decision:
        assert self.mixer is not None
        sampler, sample = self.loader.sampler, self.loader.first_sample(step)
        of_domain, of_source = sampler.domain_weights(sample), sampler.history.at(sample).weights
        # Kept, because a probe may leave a domain without weight.
        self.inside = {
            source: of_source[source] / of_domain[domain]
            for source, domain in sampler.data.domain_of.items()
            if of_domain[domain] > 0
        }
        self.weights = {name: of_domain[name] for name in self.mixer.domains}
        return self.mixer.start(self.weights)

    def _put_in_force(self, decision: Decision) -> None:
        assert self.mixer is not None and self.weights is not None
        weights = on_grid(decision.weights)
        if weights != on_grid(self.weights):
            self.loader.change(self._of_sources(weights, self.inside), f"mixer {self.name}")
            self.weights = weights

    def _observe(self, step: int, left: int) -> Observation:
        """What the mixer wants to know. Every rank gets what the first one has."""
        assert self.mixer is not None
        measure = self._losses if self.mixer.wants == "losses" else self._products
        seen = Ranks().gather(Observation(left, **measure(step)))[0]
        for what, values in (("loss", seen.losses), ("gradient product", seen.products)):
            for name, value in values.items():
                if not math.isfinite(value):
                    raise TrainError(
                        f"mixer {self.name}: the {what} of domain '{name}' is {value} before step {step + 1}"
                    )
        return seen

    def _split(self) -> Split:
        return "train" if self.cfg.mixer.text == "train" else "val"

    def _loss_windows(self, source: str) -> range | list[int]:
        tokens = len(self.loader.data.tokens(source, self._split()))
        return held_out_windows(tokens, self.cfg.train.seq_len, self._loss_sequences())

    def _loss_sequences(self) -> int:
        return int(self.cfg.mixer.sequences or self.cfg.train.eval_sequences)

    def _gradient_sequences(self) -> int:
        return int(self.cfg.mixer.sequences or self.cfg.train.global_batch)

    def _losses(self, step: int) -> dict[str, Any]:
        t, data, masked = self.cfg.train, self.loader.data, self.cfg.data.document_mask
        found = evaluate(
            self.engine, data, t.seq_len, t.micro_batch, self._loss_sequences(), self.dims, step, masked, self._split()
        )
        assert self.mixer is not None
        return {"losses": {name: found.by_domain[name] for name in self.mixer.domains}}

    def _products(self, step: int) -> dict[str, Any]:
        """Inner products of the domains' gradients with the target's, each clipped as a step clips it: one rare steep
        batch must not decide alone. Holds two gradients at a time."""
        assert self.mixer is not None
        domains, parts = self.mixer.domains, self.cfg.mixer.target or self.mixer.domains
        target = self.engine.gradient(self._drawn("target", parts, step, self._split()), step)
        shares = [target.share(target)]
        for name in domains:
            own = self.engine.gradient(self._drawn(name, [name], step, "train"), step)
            shares += [own.share(target), own.share(own)]
        sums = torch.tensor(shares, dtype=torch.float64, device=next(self.engine.model.parameters()).device)
        dist.all_reduce(sums)
        of_target, *rest = sums.tolist()
        products, cosines = {}, {}
        for name, product, square in zip(domains, rest[::2], rest[1::2], strict=True):
            norms = [math.sqrt(max(s, 0.0)) if math.isfinite(s) else math.nan for s in (square, of_target)]
            most = self.cfg.train.clip_norm or math.inf
            products[name] = product * math.prod(min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms)
            cosines[name] = product / math.prod(norms) if math.prod(norms) > 0 else 0.0
        return {"products": products, "cosines": cosines}

    def _drawn(self, what: str, parts: list[str], step: int, split: Split) -> list[Batch]:
        """This rank's batches of a gradient: sequences of ``parts`` (domains or sources, in equal parts)."""
        cfg, data, t = self.cfg, self.loader.data, self.cfg.train
        sources: dict[str, float] = {}
        for part in parts:
            for source, share in self._sources(part).items():
                sources[source] = sources.get(source, 0.0) + share
        key = seed_key(cfg.seed, "mixer", what, step)
        windows = draw_windows(data, sources, self._gradient_sequences(), t.seq_len, key, split)
        rank, size, masked = self.dims.data_rank, self.dims.data_size, cfg.data.document_mask
        return list(window_batches(data, windows, t.seq_len, t.micro_batch, rank, size, masked, split))

    def _sources(self, part: str) -> dict[str, float]:
        """Sources of a domain with their shares in it (in proportion to tokens where it has no weight), or a source."""
        data = self.loader.data
        own = [source for source in data.sources if data.domain_of[source] == part]
        if not own:
            return {part: 1.0}
        shares = {source: self.inside.get(source, 0.0) for source in own}
        tokens = {source: float(len(data.tokens(source))) for source in own}
        return shares if any(shares.values()) else {s: tokens[s] / sum(tokens.values()) for s in own}


def draw_windows(
    data: TokenData, shares: Mapping[str, float], n: int, seq_len: int, key: int, split: Split
) -> list[tuple[str, int]]:
    """``n`` windows (source, first token) of the text of ``shares`` (source -> share), a function of the arguments
    alone; no window twice, so fewer where a source has not as many as its share."""
    windows = []
    for source, count in sorted(Mixture(shares).counts(n).items()):
        starts = held_out_windows(len(data.tokens(source, split)), seq_len)
        order = Permutation(len(starts), seed_key(key, source)) if starts else None
        windows += [(source, starts[order[i]]) for i in range(min(count, len(starts))) if order is not None]
    return windows
