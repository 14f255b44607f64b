"""Sample i of a run, as a pure function of (data, seed, weights in force, i)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moetrain.config.errors import DataError
from moetrain.data.dataset import TokenData
from moetrain.data.deal import Dealer, Exhausted, Source
from moetrain.data.history import Phase, WeightHistory
from moetrain.data.order import Permutation, seed_key


class Windows(Protocol):
    """How a source's training tokens are cut into samples. ``mean_tokens``: training tokens (not padding) of a sample,
    the mean over all. ``by_document``: each piece is a document that knows nothing of the others."""

    @property
    def mean_tokens(self) -> float: ...

    @property
    def by_document(self) -> bool: ...

    def __len__(self) -> int:
        """Windows of one epoch."""

    def pieces(self, k: int) -> list[tuple[int, int]]:
        """(start, length) of each stretch of tokens that window ``k`` consists of. All its tokens but the first are
        targets: the lengths less 1 sum to at most seq_len."""


@dataclass(frozen=True)
class Cut:
    """Concatenate and cut: one stream of ``tokens`` tokens in windows of ``seq_len`` + 1 with stride ``seq_len``.

    Each window shares one token with the next, so that every token but the first is a target once; a last stretch that
    is too short is left out.
    """

    tokens: int
    seq_len: int
    by_document: bool = False

    @property
    def mean_tokens(self) -> float:
        return float(self.seq_len)

    def __len__(self) -> int:
        return max(0, self.tokens - 1) // self.seq_len

    def pieces(self, k: int) -> list[tuple[int, int]]:
        return [(k * self.seq_len, self.seq_len + 1)]


@dataclass(frozen=True)
class Sample:
    """Where a sample's tokens are: ``window`` is its number among the source's windows, ``epoch`` the source's passes
    over them before."""

    index: int
    source: str
    epoch: int
    window: int


class Sampler:
    """Deals windows of ``seq_len`` targets. Sample i does not depend on the mapping, on threads, on resuming, or
    on other samples.

    The mixture decides the source (``deal.Dealer``). An epoch of a source is a seeded permutation of its windows; when
    one ends the next begins. ``weights``: source -> share of training tokens, or None for its share of all tokens; see
    ``resolve_weights``. ``windows``: how sources are cut, by default ``Cut``. ``schedule``: phases that follow.
    ``max_epochs``: source -> passes after which it has run out (None or absent: never), and ``exhausted`` what then
    happens. Raises DataError for weights that cannot be used and for a source with weight that has no window.
    """

    def __init__(
        self,
        data: TokenData,
        seed: int,
        weights: Mapping[str, float | None] | None,
        seq_len: int,
        *,
        windows: Mapping[str, Windows] | None = None,
        schedule: Sequence[Phase] = (),
        max_epochs: Mapping[str, float | None] | None = None,
        exhausted: Exhausted = "repeat",
    ) -> None:
        self.data, self.seed, self.seq_len = data, seed, seq_len
        self.windows: dict[str, Windows] = dict(
            windows or {name: Cut(len(data.tokens(name)), seq_len) for name in data.sources}
        )
        sources = {}
        for name, cut in self.windows.items():
            most = (max_epochs or {}).get(name)
            cap = None if most is None or not len(cut) else max(1, math.floor(most * len(cut) + 1e-9))
            sources[name] = Source(data.domain_of[name], cut.mean_tokens or 1.0, cap)
        phases = [Phase(0, data.weights(weights), "config"), *schedule]
        for phase in phases:
            self._check(phase.weights)
        self.dealer = Dealer(sources, phases, exhausted)
        self._orders: dict[str, tuple[int, Permutation]] = {}

    @property
    def history(self) -> WeightHistory:
        """The weights of the run: those that were in force, and those to come as far as they are known."""
        return self.dealer.history

    @property
    def end(self) -> int | None:
        """Samples that there are when the data runs out under ``exhausted``; None: no end."""
        return self.dealer.end

    def change(self, first_sample: int, weights: Mapping[str, float], why: str) -> None:
        """From ``first_sample`` on, deal by ``weights`` (source -> share of training tokens, any positive scale).

        Call it through ``Loader.change``, which forgets what it has prepared. Raises DataError for a sample that has
        been dealt and for weights that cannot be used.
        """
        self._check(weights)
        self.dealer.change(first_sample, weights, why)

    def domain_weights(self, i: int) -> dict[str, float]:
        """Share of training tokens of each domain that is in force at sample ``i``."""
        found = dict.fromkeys(self.data.domains, 0.0)
        for name, weight in self.history.at(i).weights.items():
            found[self.data.domain_of[name]] += weight
        return found

    def spread(self, weights: Mapping[str, float], i: int) -> dict[str, float]:
        """Shares of sources for ``weights`` of domains: within a domain they are what they are at sample ``i``, or,
        where the domain has none there, in proportion to tokens."""
        now, tokens = self.history.at(i).weights, {name: len(self.data.tokens(name)) for name in self.data.sources}
        found: dict[str, float] = {}
        for domain in self.data.domains:
            names = [name for name in self.data.sources if self.data.domain_of[name] == domain]
            inside = now if any(now[name] > 0 for name in names) else tokens
            total = sum(inside[name] for name in names)
            found |= {name: weights.get(domain, 0.0) * inside[name] / total for name in names}
        return found

    def locate(self, i: int) -> Sample:
        """Source, epoch and window of sample ``i``. Raises DataError past the end of the data."""
        return self.locate_all([i])[0]

    def locate_all(self, numbers: Sequence[int]) -> list[Sample]:
        """``locate`` of each of ``numbers``, those of a source together, which takes a fraction of the time."""
        found: list[Sample] = [Sample(i, "", 0, 0) for i in numbers]
        together: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for n, i in enumerate(numbers):
            source, j = self.dealer.locate(i)
            epoch, position = divmod(j, len(self.windows[source]))
            together.setdefault((source, epoch), []).append((n, position))
        for (source, epoch), places in together.items():
            windows = self._order(source, epoch).entries([position for _, position in places])
            for (n, _), window in zip(places, windows, strict=True):
                found[n] = Sample(numbers[n], source, epoch, window)
        return found

    def _order(self, source: str, epoch: int) -> Permutation:
        known = self._orders.get(source)  # remembers the last epoch's keys; never changes what comes out
        if known is None or known[0] != epoch:
            known = (epoch, Permutation(len(self.windows[source]), seed_key(self.seed, source, epoch)))
            self._orders[source] = known
        return known[1]

    def tokens(self, sample: Sample) -> np.ndarray:
        """The sample's token ids (int64), its pieces one after the other. Raises DataError for an
        id that the model's vocabulary does not have."""
        pieces = self.windows[sample.source].pieces(sample.window)
        parts = [self.data.read(sample.source, start, start + length) for start, length in pieces]
        ids = (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int64)
        if ids.max() >= self.data.vocab_size or ids.min() < 0:
            bad = int(np.argmax((ids >= self.data.vocab_size) | (ids < 0)))
            places = np.concatenate([np.arange(start, start + length) for start, length in pieces])
            raise DataError(
                f"token {places[bad]} of source '{sample.source}' is {ids[bad]}, past the vocabulary of "
                f"{self.data.vocab_size}; the shard is "
                "damaged or of another tokenizer: delete the prepared folder and run 'moetrain prepare' again"
            )
        return ids

    def __getitem__(self, i: int) -> tuple[str, np.ndarray]:
        """(source, token ids) of sample ``i``."""
        sample = self.locate(i)
        return sample.source, self.tokens(sample)

    def epochs(self, i: int) -> dict[str, float]:
        """Passes over each source's windows after ``i`` samples; sources without a window are left out."""
        counts = self.dealer.counts(i)
        return {name: counts[name] / len(cut) for name, cut in self.windows.items() if len(cut)}

    def _check(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            if weight > 0 and name in self.windows and not len(self.windows[name]):
                if self.windows[name].by_document:
                    raise DataError(
                        f"source '{name}' has no document of two tokens or more, so there is nothing to predict; give "
                        "it more text, or set its weight to 0"
                    )
                raise DataError(
                    f"source '{name}' has {len(self.data.tokens(name))} training tokens, less than one sequence of "
                    f"{self.seq_len} + 1; use a smaller "
                    "train.seq_len, give it more text, or set its weight to 0"
                )
