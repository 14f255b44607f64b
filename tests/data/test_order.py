"""Which domain and window a sample number stands for: exact shares at every prefix, random access, and true
permutations."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.order import Mixture, Permutation

PILE = [0.2369, 0.1854, 0.1133, 0.1018, 0.0819, 0.0665, 0.0511, 0.0464, 0.0388, 0.0271, 0.0160, 0.0118, 0.0080, 0.0079,
        0.0039, 0.0037, 0.0018]  # fmt: skip
MIXTURES = {
    "two, one rare": [0.999, 0.001],
    "three": [0.5, 0.3, 0.2],
    "equal": [1.0] * 7,
    "the Pile": PILE,
    "Zipf over 200": [1 / n for n in range(1, 201)],
    "one large, 60 small": [0.9] + [0.1 / 60] * 60,
    "Fibonacci": [1.618**-n for n in range(25)],
}


def deviations(weights: list[float], samples: int) -> np.ndarray:
    """(samples, domains): what each domain got in each prefix, less its share, by counting one sample after the
    other."""
    names = [f"d{n:04}" for n in range(len(weights))]
    mixture = Mixture(dict(zip(names, weights, strict=True)))
    given_to = np.array([names.index(mixture.locate(i)[0]) for i in range(samples)])
    got = np.cumsum(given_to[:, None] == np.arange(len(weights)), axis=0)
    shares = np.asarray(weights) / np.sum(weights)
    return got - np.arange(1, samples + 1)[:, None] * shares


@pytest.mark.parametrize("name", MIXTURES)
def test_every_prefix_has_the_asked_shares_to_about_one_sample(name: str) -> None:
    assert np.abs(deviations(MIXTURES[name], 8000)).max() <= 1.2


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_shares_hold_for_any_weights(weights: list[float]) -> None:
    assert np.abs(deviations(weights, 300)).max() < 2  # the proven bound


def test_token_shares_are_within_a_thousandth_at_every_prefix_over_a_million_tokens() -> None:
    seq_len, first = 512, 1_000_000 // 512 + 1
    off = np.abs(deviations(PILE, 4 * first))[first:]
    assert (off / np.arange(first + 1, 4 * first + 1)[:, None]).max() < 1e-3
    assert first * seq_len > 1_000_000


def test_draws_of_a_domain_are_numbered_without_gaps_and_any_sample_is_found_directly() -> None:
    mixture = Mixture(dict(zip("abcdefg", [3, 1, 4, 1, 5, 9, 2.6], strict=True)))
    seen: Counter[str] = Counter()
    for i in range(2000):
        assert mixture.counts(i) == {name: seen[name] for name in "abcdefg"}
        domain, j = mixture.locate(i)
        assert j == seen[domain]
        seen[domain] += 1
    far = 10**13  # 10 trillion samples in: one walk down the tree
    domain, j = mixture.locate(far)
    before, after = mixture.counts(far), mixture.counts(far + 1)
    assert before[domain] == j and after == before | {domain: j + 1} and sum(before.values()) == far


def test_the_order_and_scale_of_the_weights_do_not_matter_and_zero_gets_nothing() -> None:
    a = Mixture({"x": 1.0, "y": 1.0, "z": 2.0, "none": 0.0})
    b = Mixture({"none": 0.0, "z": 0.5, "y": 0.25, "x": 0.25})
    assert [a.locate(i) for i in range(500)] == [b.locate(i) for i in range(500)]
    assert "none" not in a.counts(500)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4097])
def test_permutations_reach_every_entry_once(n: int) -> None:
    for key in (0, 1, 2**63 + 5):
        order = Permutation(n, key)
        assert sorted(order[i] for i in range(n)) == list(range(n))


def test_permutations_are_spread_evenly_over_keys() -> None:
    """Every entry lands on every place about equally often: chi-square over 4,000 keys, 9 degrees of freedom."""
    places = np.zeros((10, 10))
    for key in range(4000):
        order = Permutation(10, key * 0x9E3779B97F4A7C15 % 2**64)
        for i in range(10):
            places[i, order[i]] += 1
    chi_square = ((places - 400) ** 2 / 400).sum(axis=1)
    assert chi_square.max() < 33.7  # the 0.9999 quantile
