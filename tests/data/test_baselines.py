"""The counting baselines against their formulas written out with dictionaries, one token at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from moetrain.config.schema_data import SourceConfig
from moetrain.data import baselines as module
from moetrain.data.baselines import Bigram, Unigram, baselines
from moetrain.data.dataset import TokenData
from moetrain.data.loader import validation_batches
from moetrain.data.prepare import prepare
from tests.data.conftest import config


class LiteralKneserNey:
    """Interpolated Kneser-Ney for bigrams, as in Chen and Goodman (1998), from dictionaries of counts."""

    def __init__(self, streams: list[list[int]], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.pairs = Counter(pair for stream in streams for pair in itertools.pairwise(stream))
        self.context: Counter[int] = Counter()
        self.after: dict[int, set[int]] = defaultdict(set)
        self.before: dict[int, set[int]] = defaultdict(set)
        for (u, v), count in self.pairs.items():
            self.context[u] += count
            self.after[u].add(v)
            self.before[v].add(u)
        self.discount = self.estimate(list(self.pairs.values()))
        self.lower_discount = self.estimate([len(us) for us in self.before.values()])

    @staticmethod
    def estimate(counts: list[int]) -> float:
        ones, twos = counts.count(1), counts.count(2)
        return ones / (ones + 2 * twos) if ones and twos else 0.5

    def p_lower(self, v: int) -> float:
        types = len(self.pairs)
        kept = max(len(self.before.get(v, ())) - self.lower_discount, 0)
        reserved = sum(min(self.lower_discount, len(us)) for us in self.before.values())
        return kept / types + reserved / types / self.vocab_size

    def p(self, u: int, v: int) -> float:
        if self.context[u] == 0:
            return self.p_lower(v)
        kept = max(self.pairs[u, v] - self.discount, 0)
        return (kept + self.discount * len(self.after[u]) * self.p_lower(v)) / self.context[u]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """Two domains with few tokens, so that rare and unseen pairs matter."""
    folder = tmp_path_factory.mktemp("baselines")
    rng = np.random.default_rng(0)
    sources = {}
    for name, letters in {"a": "abcdefgh ", "b": "efghijklmn \n"}.items():
        falling = np.arange(len(letters), 0, -1)
        text = "".join(rng.choice(list(letters), size=2500, p=falling / falling.sum()))
        (folder / f"{name}.txt").write_text(text)
        sources[name] = SourceConfig(paths=[str(folder / f"{name}.txt")])
    cfg = config(folder, sources, vocab_size=300, val_fraction=0.2)
    prepare(cfg, progress=False)
    return TokenData.open(cfg.dir)


def predicted(data: TokenData, domain: str, seq_len: int, most: int) -> list[tuple[int, int]]:
    """(input, target) of everything that the evaluation of a model scores."""
    pairs = []
    for batch in validation_batches(data, domain, seq_len, 3, most):
        kept = batch.targets_BS != -100
        pairs += list(zip(batch.tokens_BS[kept].tolist(), batch.targets_BS[kept].tolist(), strict=True))
    return pairs


@pytest.mark.parametrize(("seq_len", "most"), [(16, 0), (16, 5), (7, 3)])
def test_both_baselines_equal_the_literal_formulas_on_the_scored_tokens(
    small: TokenData, seq_len: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 101)  # counts are merged from many pieces
    vocab_size = small.manifest.vocab_size
    streams = [small.tokens(domain).tolist() for domain in small.domains]
    counts = Counter(token for stream in streams for token in stream)
    kneser_ney = LiteralKneserNey(streams, vocab_size)
    sums = {}
    for domain in small.domains:
        pairs = predicted(small, domain, seq_len, most)
        unigram = [-math.log((counts[v] + 0.5) / (counts.total() + 0.5 * vocab_size)) for _, v in pairs]
        sums[domain] = (sum(unigram), sum(-math.log(kneser_ney.p(u, v)) for u, v in pairs), len(pairs))
    found = baselines(small, seq_len, most)
    for domain, (unigram_sum, bigram_sum, tokens) in sums.items():
        assert found.by_domain[domain].tokens == tokens
        assert found.by_domain[domain].unigram == pytest.approx(unigram_sum / tokens, rel=1e-12)
        assert found.by_domain[domain].bigram == pytest.approx(bigram_sum / tokens, rel=1e-12)
    total = np.sum(list(sums.values()), axis=0)
    assert (found.unigram, found.bigram) == pytest.approx((total[0] / total[2], total[1] / total[2]), rel=1e-12)


def test_the_models_are_probability_distributions() -> None:
    rng = np.random.default_rng(1)
    vocab_size = 40
    stream = rng.zipf(1.5, size=600) % (vocab_size - 5)  # some tokens never occur
    codes, counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
    every = np.arange(vocab_size)
    bigram = Bigram(codes, counts, vocab_size)
    for u in range(vocab_size):
        assert np.exp(-bigram.cost(np.full(vocab_size, u), every)).sum() == pytest.approx(1, abs=1e-12)
    unigram = Unigram(np.bincount(stream, minlength=vocab_size))
    assert np.exp(-unigram.cost(every, every)).sum() == pytest.approx(1, abs=1e-12)


def test_more_is_gained_where_there_is_more_to_know(data: TokenData) -> None:
    found = baselines(data)
    assert found.bigram < found.unigram < math.log(data.manifest.vocab_size)
    assert found.tokens == sum(len(data.tokens(domain, "val")) - 1 for domain in data.domains)


def test_a_part_of_a_large_training_split_is_enough(data: TokenData, tmp_path: Path) -> None:
    whole, part = baselines(data), baselines(data, max_train_tokens=6000)
    assert part.tokens == whole.tokens and whole.bigram < part.bigram < whole.bigram + 0.5
