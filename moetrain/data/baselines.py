"""What counting achieves: cross-entropy of unigram and bigram models on the held-out tokens, for comparison with a
trained model.

Counts come from the training split of all domains together; nothing is fitted to held-out tokens. The unigram model
adds 1/2 to every count (Krichevsky and Trofimov, 1981). The bigram model is interpolated Kneser-Ney (Kneser and Ney,
1995; Chen and Goodman, 1998, section 2.7): with discount d, c(uv) the count of bigram uv, N(u.) the number of
different tokens seen after u,

    p(v | u) = max(c(uv) - d, 0) / c(u)  +  d N(u.) / c(u) * p1(v)

where p1 is absolute discounting of the number of different tokens seen before v, interpolated with 1/V. Each discount
is n1 / (n1 + 2 n2) from the number of counts that are 1 and 2 (Ney, Essen and Kneser, 1994).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from moetrain.data.dataset import TokenData
from moetrain.data.loader import held_out_windows

logger = logging.getLogger("moetrain")

CHUNK = 1 << 24  # tokens counted at once


@dataclass(frozen=True)
class Nats:
    """Cross-entropy of both models in nats per token, over ``tokens`` predicted tokens."""

    unigram: float
    bigram: float
    tokens: int


@dataclass(frozen=True)
class Baselines(Nats):
    """Over the held-out text of all domains together, and of each."""

    by_domain: dict[str, Nats]


class Unigram:
    """Add-1/2 estimate from the counts of all ``vocab_size`` tokens."""

    def __init__(self, counts: np.ndarray) -> None:
        self.nats = -np.log((counts + 0.5) / (counts.sum() + 0.5 * len(counts)))

    def cost(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """-log p(token) of every position."""
        return self.nats[token]


class Bigram:
    """Interpolated Kneser-Ney from sorted bigram codes (previous * V + token) and their counts."""

    def __init__(self, codes: np.ndarray, counts: np.ndarray, vocab_size: int) -> None:
        self.vocab_size, self.codes, self.counts = vocab_size, codes, counts
        self.discount = absolute_discount(counts)
        self.context = np.bincount(codes // vocab_size, weights=counts, minlength=vocab_size)
        self.followers = np.bincount(codes // vocab_size, minlength=vocab_size)
        before = np.bincount(codes % vocab_size, minlength=vocab_size)
        discount = absolute_discount(before)
        kept, types = np.maximum(before - discount, 0.0), max(1, before.sum())
        self.lower = kept / types + (1 - kept.sum() / types) / vocab_size

    def cost(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """-log p(token | previous) of every position."""
        code = previous * self.vocab_size + token
        at = np.minimum(np.searchsorted(self.codes, code), len(self.codes) - 1)
        seen = np.where(self.codes[at] == code, self.counts[at], 0)
        total = self.context[previous]
        divisor = np.maximum(total, 1)
        higher = np.maximum(seen - self.discount, 0.0) / divisor
        backoff = np.where(total > 0, self.discount * self.followers[previous] / divisor, 1.0)
        return -np.log(higher + backoff * self.lower[token])


def absolute_discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2), n1 and n2 being how many counts are 1 and 2; 1/2 where there are none of them."""
    ones, twos = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return ones / (ones + 2 * twos) if ones and twos else 0.5


def baselines(
    data: TokenData, seq_len: int = CHUNK, max_sequences: int = 0, max_train_tokens: int = 50_000_000
) -> Baselines:
    """Both baselines on exactly the tokens that ``validation_batches`` predicts with the same ``seq_len`` and
    ``max_sequences``; while that is 0 these are all held-out tokens but each domain's first, whatever ``seq_len`` is.

    Of a training split of more than ``max_train_tokens``, each source's leading share is counted, and a log line says
    so.
    """
    models = _fit(data, max_train_tokens)
    sums = {domain: np.zeros(3) for domain in data.domains}  # unigram, bigram, tokens
    length = seq_len if max_sequences > 0 else CHUNK
    for source in data.sources:
        held_out, domain = data.tokens(source, "val"), data.domain_of[source]
        for start in held_out_windows(len(held_out), length, max_sequences):
            window = held_out[start : start + length + 1].astype(np.int64)
            previous, token = window[:-1], window[1:]
            sums[domain] += [*(model.cost(previous, token).sum() for model in models), len(token)]
    total = _per_token(np.sum(list(sums.values()), axis=0))
    return Baselines(total.unigram, total.bigram, total.tokens, {domain: _per_token(s) for domain, s in sums.items()})


def _per_token(sums: np.ndarray) -> Nats:
    tokens = max(1.0, float(sums[2]))
    return Nats(float(sums[0]) / tokens, float(sums[1]) / tokens, int(sums[2]))


def _fit(data: TokenData, max_train_tokens: int) -> tuple[Unigram, Bigram]:
    """Count the training split; bigrams do not cross from one source to the next."""
    vocab_size = data.manifest.vocab_size
    available = sum(len(data.tokens(source)) for source in data.sources)
    share = min(1.0, max_train_tokens / available)
    if share < 1:
        logger.info("baselines: counting the first %.1f%% of each source's %d training tokens", 100 * share, available)
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for source in data.sources:
        tokens = data.tokens(source)
        end = max(2, int(share * len(tokens)))
        for i in range(0, end, CHUNK):
            chunk = tokens[i : min(i + CHUNK + 1, end)].astype(np.int64)  # one more: the bigram over the border
            unigrams += np.bincount(chunk[:CHUNK], minlength=vocab_size)
            new_codes, new_counts = np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True)
            codes, counts = _merge(codes, counts, new_codes, new_counts)
    return Unigram(unigrams), Bigram(codes, counts, vocab_size)


def _merge(
    codes: np.ndarray, counts: np.ndarray, more: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Union of two sorted tables of counts."""
    union, place = np.unique(np.concatenate([codes, more]), return_inverse=True)
    total = np.zeros(len(union), dtype=np.int64)
    np.add.at(total, place, np.concatenate([counts, more_counts]))
    return union, total
