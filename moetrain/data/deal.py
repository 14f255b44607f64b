"""Which source sample i comes from, and which of that source's samples it is, under weights that change."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from moetrain.config.errors import DataError
from moetrain.data.history import Phase, WeightHistory
from moetrain.data.order import ONE, Mixture
from moetrain.data.weights import check_weights

Exhausted = Literal["repeat", "stop", "reweight"]
KEPT_TREES = 4  # of the phases looked at last; others are built again when asked for


@dataclass(frozen=True)
class Source:
    """What dealing needs to know of a source. ``domain``: the group that it belongs to. ``tokens``: mean training
    tokens of a sample. ``cap``: samples after which it has run out; None: never."""

    domain: str
    tokens: float
    cap: int | None = None


@dataclass(frozen=True)
class _Before:
    """What sources got before a phase: samples, and what these are short of their shares, in 2^-60 samples."""

    counts: dict[str, int]
    owed: dict[str, int]


class Dealer:
    """Deals the samples of a run to its sources. Sample i is a pure function of (sources, phases, i).

    Within a phase the Huffman mixture of order.py deals; the samples of a source are counted on from one phase to the
    next, so a change of weights neither repeats nor skips any, and so is what the shares were off, so that they hold
    over the whole run however often they change. ``weights`` of phases are shares of tokens: samples are dealt in
    proportion to weight / tokens.

    ``exhausted`` says what happens at the first sample that would go beyond a source's cap. "reweight": a phase begins
    in which the source has weight 0; its share goes to the others of its domain, and when none is left there, to all.
    Where nothing is left of what a mixer tries out, the first weights of ``asked`` hold. "stop", or nothing left to
    deal: ``end`` is that sample. "repeat": caps do not count.

    Needs memory for phases x sources. ``history`` holds all phases, those to come included, as far as they are known.
    """

    def __init__(self, sources: Mapping[str, Source], asked: Iterable[Phase], exhausted: Exhausted = "repeat") -> None:
        self.sources, self.exhausted = dict(sources), exhausted
        self.history = WeightHistory()
        self.end: int | None = None
        self.dealt = 0  # samples that have been used: what dealt them is past changing
        self._asked = _in_order(asked)
        self._first = self._asked[0].weights
        self._before: list[_Before] = []
        self._trees: dict[int, Mixture] = {}
        self._lock = threading.Lock()
        self._extend()

    def locate(self, i: int) -> tuple[str, int]:
        """(source, j): sample ``i`` is the j-th (from 0) of the source. Raises DataError from ``end`` on."""
        if self.end is not None and i >= self.end:
            raise DataError(f"sample {i} is past the end of the data, which is at sample {self.end}")
        n = self.history.index(i)
        source, j = self._tree(n).locate(i - self.history.phases[n].first_sample)
        return source, self._before[n].counts[source] + j

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first ``samples`` samples each source has."""
        n = self.history.index(samples)
        found = dict(self._before[n].counts)
        for source, count in self._tree(n).counts(samples - self.history.phases[n].first_sample).items():
            found[source] += count
        return found

    def left_of(self, weights: Mapping[str, float], i: int) -> dict[str, float]:
        """What ``weights`` of a mixer are at sample ``i`` when they were the last that were asked for before it:
        without the sources that have run out."""
        n, left = self.history.index(i), dict(weights)
        if self.exhausted != "reweight":
            return left
        for phase in self.history.phases[self._asked_index(n) : n + 1]:
            left = self._left(left, "mixer", self.counts(phase.first_sample)) or left
        return left

    def asked_at(self, i: int) -> Phase:
        """The phase at sample ``i``, or the one before it that was asked for, where sources have run out since."""
        return self.history.phases[self._asked_index(self.history.index(i))]

    def change(self, first_sample: int, weights: Mapping[str, float], why: str) -> None:
        """From ``first_sample`` on, deal by ``weights`` (source -> share of tokens), until the next phase that was
        asked for. Raises DataError for weights that cannot be used and for a sample that has been dealt."""
        if first_sample < self.dealt:
            raise DataError(f"weights cannot change at sample {first_sample}: {self.dealt} samples have been dealt")
        phase = Phase(first_sample, usable(weights, self.sources), why)
        self._asked = _in_order([*self._asked, phase])
        self._cut(first_sample)
        self._extend()

    def restore(self, history: WeightHistory, samples: int, asked: Iterable[Phase]) -> None:
        """Take ``history``, of which ``samples`` samples were dealt, as it is; ``asked`` holds from there on."""
        self._cut(0)
        self._asked = _in_order(asked)
        self.dealt = samples
        for phase in history:
            self._begin(phase)
        self._extend()

    def settled(self, samples: int) -> WeightHistory:
        """What ``restore`` needs after ``samples`` samples: the phases that have begun, and decisions that no config
        repeats."""
        kept = (p for p in self.history if p.first_sample < samples or p.why.split()[0] in ("user", "mixer"))
        return WeightHistory(kept)

    def _extend(self) -> None:
        """Find the phases that follow from what is asked for and from caps."""
        last = self.history.phases[-1].first_sample if len(self.history) else -1
        coming = [phase for phase in self._asked if phase.first_sample > last]
        self.end = None
        while True:
            out = self._runs_out() if len(self.history) else None
            if out is not None and (not coming or out[0] < coming[0].first_sample):
                first, source = out
                weights = self._left(self.history.phases[-1].weights, self.asked_at(first).why, self.counts(first))
                if self.exhausted == "stop" or not weights:
                    self.end = first
                    return
                if first == self.history.phases[-1].first_sample:
                    self._cut(first)
                self._begin(Phase(first, weights, f"exhausted {source}"))
            elif coming:
                phase = coming.pop(0)
                if self.exhausted == "reweight" and len(self.history):
                    left = self._without_exhausted(phase.weights, self.counts(phase.first_sample))
                    phase = Phase(phase.first_sample, left or phase.weights, phase.why)
                self._begin(phase)
            else:
                return

    def _asked_index(self, n: int) -> int:
        """Number of the phase that ``asked_at`` gives for phase ``n``."""
        while n and self.history.phases[n].why.startswith("exhausted"):
            n -= 1
        return n

    def _left(self, weights: Mapping[str, float], why: str, counts: Mapping[str, int]) -> dict[str, float]:
        """What is dealt by once sources have run out, where ``weights`` were asked for by ``why``; empty: nothing."""
        left = self._without_exhausted(weights, counts)
        return left if left or not why.startswith("mixer") else self._without_exhausted(self._first, counts)

    def _runs_out(self) -> tuple[int, str] | None:
        """(sample, source): the first sample of the last phase that would go beyond a source's cap."""
        if self.exhausted == "repeat":
            return None
        first, counts = self.history.phases[-1].first_sample, self._before[-1].counts
        left = {n: max(0, s.cap - counts[n]) for n, s in self.sources.items() if s.cap is not None}
        found = self._tree(len(self.history) - 1).positions(left) if left else {}
        if not found:
            return None
        position, source = min((position, name) for name, position in found.items())
        return max(first + position, self.dealt), source

    def _without_exhausted(self, weights: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
        """``weights`` with the share of each source that has reached its cap given to the others of its domain, or to
        all where it has none; empty when nothing is left."""
        gone = {name for name, s in self.sources.items() if s.cap is not None and counts[name] >= s.cap}
        if not any(weights[name] > 0 for name in gone):
            return dict(weights)
        whole: dict[str, float] = {}
        left: dict[str, float] = {}
        for name, weight in weights.items():
            domain = self.sources[name].domain
            whole[domain] = whole.get(domain, 0.0) + weight
            left[domain] = left.get(domain, 0.0) + (0.0 if name in gone else weight)
        all_left = sum(whole[domain] for domain in left if left[domain] > 0)
        if all_left == 0:
            return {}
        return {
            name: 0.0 if name in gone or weight == 0 else weight * whole[d] / left[d] / all_left
            for name, weight in weights.items()
            for d in [self.sources[name].domain]
        }

    def _begin(self, phase: Phase) -> None:
        """Add a phase, with what each source got before it. Its weights are put in the order of the sources: that of a
        sum decides its last bit, by which a sample may go to another source, and a checkpoint keeps none but this."""
        phase = replace(phase, weights={name: phase.weights.get(name, 0.0) for name in self.sources})
        before = _Before(dict.fromkeys(self.sources, 0), dict.fromkeys(self.sources, 0))
        if len(self.history):
            counts, owed = self.counts(phase.first_sample), dict(self._before[-1].owed)
            samples = phase.first_sample - self.history.phases[-1].first_sample
            for name, weight in self._tree(len(self.history) - 1).weights.items():
                owed[name] += samples * weight - (counts[name] - self._before[-1].counts[name]) * ONE
            before = _Before(counts, owed)
        self.history.append(phase)
        self._before.append(before)

    def _cut(self, first_sample: int) -> None:
        """Forget the phases that begin at ``first_sample`` or later."""
        kept = [phase for phase in self.history if phase.first_sample < first_sample]
        self.history = WeightHistory(kept)
        del self._before[len(kept) :]
        with self._lock:
            self._trees.clear()

    def _tree(self, n: int) -> Mixture:
        """The mixture of phase ``n``."""
        with self._lock:
            tree = self._trees.get(n)
            if tree is None:
                weights, owed = self.history.phases[n].weights, self._before[n].owed
                shares = {name: weight / self.sources[name].tokens for name, weight in weights.items() if weight > 0}
                tree = Mixture(shares, {name: s.domain for name, s in self.sources.items()}, owed)
                self._trees[n] = tree
                while len(self._trees) > KEPT_TREES:
                    del self._trees[next(iter(self._trees))]
            return tree


def _in_order(phases: Iterable[Phase]) -> list[Phase]:
    """``phases`` by their first samples; of those that begin together the one that was said last. A schedule can have
    such until it is known at which sample a resumed run stands."""
    return sorted({phase.first_sample: phase for phase in phases}.values(), key=lambda phase: phase.first_sample)


def usable(weights: Mapping[str, float], known: Iterable[str]) -> dict[str, float]:
    """``weights`` for all ``known`` sources (0 where none is given), summing to 1. Raises DataError."""
    names = list(known)
    check_weights({name: weights.get(name, 0.0) for name in names} | dict(weights), names)
    total = sum(weights.values())
    return {name: weights.get(name, 0.0) / total for name in names}
