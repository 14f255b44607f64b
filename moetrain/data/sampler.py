"""Sample i of a run, as a pure function of (data, seed, weights, i)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moetrain.config.errors import DataError
from moetrain.data.dataset import TokenData
from moetrain.data.order import Mixture, Permutation, seed_key


@dataclass(frozen=True)
class Sample:
    """Where a sample's tokens are: ``start`` counts tokens in the domain's training split, ``epoch`` its passes over
    that."""

    index: int
    domain: str
    epoch: int
    start: int


class Sampler:
    """Deals windows of ``seq_len`` + 1 tokens. Sample i does not depend on the mapping, on threads, on resuming, or
    on other samples.

    The mixture decides the domain. A domain's training tokens are cut into windows with stride ``seq_len`` (each
    shares one token with the next, so that every token but the first is a target once; a last stretch that is too
    short is left out). An epoch is a seeded permutation of the windows; when one ends the next begins. ``weights``:
    domain -> share of training tokens, or None for the domain's share of all tokens; see ``resolve_weights``. Raises
    DataError for weights that cannot be used and for a domain shorter than one window.
    """

    def __init__(self, data: TokenData, seed: int, weights: Mapping[str, float | None] | None, seq_len: int) -> None:
        self.data, self.seed, self.seq_len = data, seed, seq_len
        self.weights = data.weights(weights)
        self.mixture = Mixture(self.weights)
        self.windows = {name: (len(data.tokens(name)) - 1) // seq_len for name in data.domains}
        for name, weight in self.weights.items():
            if weight > 0 and self.windows[name] == 0:
                raise DataError(
                    f"domain '{name}' has {len(data.tokens(name))} training tokens, less than one sequence of "
                    f"{seq_len} + 1; use a smaller "
                    "train.seq_len, give it more text, or set its weight to 0"
                )
        self._orders: dict[str, tuple[int, Permutation]] = {}

    def locate(self, i: int) -> Sample:
        """Domain, epoch and first token of sample ``i``."""
        domain, j = self.mixture.locate(i)
        epoch, position = divmod(j, self.windows[domain])
        known = self._orders.get(domain)  # remembers the last epoch's keys; never changes what comes out
        if known is None or known[0] != epoch:
            known = (epoch, Permutation(self.windows[domain], seed_key(self.seed, domain, epoch)))
            self._orders[domain] = known
        return Sample(i, domain, epoch, known[1][position] * self.seq_len)

    def tokens(self, sample: Sample) -> np.ndarray:
        """The sample's seq_len + 1 token ids (int64). Raises DataError for an id that the model's vocabulary does not
        have."""
        ids = self.data.tokens(sample.domain)[sample.start : sample.start + self.seq_len + 1].astype(np.int64)
        if ids.max() >= self.data.vocab_size or ids.min() < 0:
            bad = int(np.argmax((ids >= self.data.vocab_size) | (ids < 0)))
            raise DataError(
                f"token {sample.start + bad} of domain '{sample.domain}' is {ids[bad]}, past the vocabulary of "
                f"{self.data.vocab_size}; the shard is "
                "damaged or of another tokenizer: delete the prepared folder and run 'moetrain prepare' again"
            )
        return ids

    def __getitem__(self, i: int) -> tuple[str, np.ndarray]:
        """(domain, token ids) of sample ``i``."""
        sample = self.locate(i)
        return sample.domain, self.tokens(sample)

    def epochs(self, i: int) -> dict[str, float]:
        """Passes over each domain's training tokens after ``i`` samples."""
        return {name: count / self.windows[name] for name, count in self.mixture.counts(i).items()}
