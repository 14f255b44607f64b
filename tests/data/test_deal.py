"""Dealing under weights that change: shares hold over the whole run, nothing is repeated or skipped, caps are kept.

The reference is counting: every sample is asked for, one after the other, and what each source and domain got is
compared with the sum of what the weights in force asked for.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.errors import DataError
from moetrain.data.deal import Dealer, Source
from moetrain.data.history import Phase, WeightHistory

WEIGHTS = st.floats(1e-4, 100) | st.just(0.0)


def names(count: int) -> list[str]:
    return [f"s{n}" for n in range(count)]


def shares(weights: list[float]) -> dict[str, float]:
    return {name: weight / sum(weights) for name, weight in zip(names(len(weights)), weights, strict=True)}


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Source], list[Phase]]:
    """Sources in domains, and phases of 1 to 700 samples with weights of their own."""
    count = draw(st.integers(1, 12))
    domains = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    sources = {name: Source(f"d{domain}", 512.0) for name, domain in zip(names(count), domains, strict=True)}
    phases, first = [], 0
    for _ in range(draw(st.integers(1, 5))):
        weights = draw(st.lists(WEIGHTS, min_size=count, max_size=count).filter(any))
        phases.append(Phase(first, shares(weights), "config"))
        first += draw(st.integers(1, 700))
    return sources, phases


def deviations(dealer: Dealer, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """((samples, sources), (samples, domains)): samples of each prefix, less what the weights in force asked for."""
    order = list(dealer.sources)
    got, asked = np.zeros((samples, len(order))), np.zeros((samples, len(order)))
    history = WeightHistory(dealer.history)
    for i in range(samples):
        got[i, order.index(dealer.locate(i)[0])] = 1
        weights = history.at(i).weights
        per_token = {name: weights[name] / dealer.sources[name].tokens for name in order}
        asked[i] = [per_token[name] / sum(per_token.values()) for name in order]
    off = np.cumsum(got - asked, axis=0)
    domains = sorted({source.domain for source in dealer.sources.values()})
    member = np.array([[dealer.sources[name].domain == d for d in domains] for name in order], dtype=float)
    return off, off @ member


@given(runs())
@settings(max_examples=60, deadline=None)
def test_shares_hold_over_all_phases_for_sources_and_domains(run: tuple[dict[str, Source], list[Phase]]) -> None:
    """At every prefix, however often weights changed before: a few samples. (A search for the worst found 3.0 for a
    domain and 4.0 for a source of a domain of several.) Less than 2 while they never changed."""
    sources, phases = run
    of_sources, of_domains = deviations(Dealer(sources, phases), phases[-1].first_sample + 300)
    assert np.abs(of_domains).max() < 4 and np.abs(of_sources).max() < 6
    of_sources, of_domains = deviations(Dealer(sources, phases[:1]), 300)
    assert np.abs(of_domains).max() < 2 and np.abs(of_sources).max() < 3


def test_a_domain_is_owed_what_its_sources_without_weight_are() -> None:
    """Two domains are never more than half a sample off, whichever of their sources have weight."""
    sources = {name: Source(domain, 512.0) for name, domain in zip(names(4), "abaa", strict=True)}
    weights = [[0.5, 0.0, 0.0, 0.5], [0.0, 0.5, 0.5, 0.0], [0.1, 0.9, 0.0, 0.0]]
    phases = [Phase(first, shares(w), "config") for first, w in zip([0, 5, 8], weights, strict=True)]
    _, of_domains = deviations(Dealer(sources, phases), 50)
    assert np.abs(of_domains).max() < 0.5 + 1e-9


def test_a_rare_source_is_dealt_under_a_thousand_short_phases() -> None:
    """Weights that a mixer changes every 8 samples: rounding each phase alone would never deal the rare source."""
    rng = np.random.default_rng(0)
    phases = [Phase(8 * n, shares([*rng.uniform(1, 2, 5), 0.05]), "mixer test") for n in range(1000)]
    dealer = Dealer({name: Source(name, 512.0) for name in names(6)}, phases)
    off, _ = deviations(dealer, 8000)
    assert np.abs(off).max() < 2
    assert dealer.counts(8000)["s5"] > 40


@given(runs(), st.data())
@settings(max_examples=40, deadline=None)
def test_token_shares_are_within_a_thousandth_at_every_prefix_over_a_million_tokens(
    run: tuple[dict[str, Source], list[Phase]], data: st.DataObject
) -> None:
    """Samples of 128 tokens, of which rounding moves a few: 0.1% are 7. Asked for at random
    prefixes, by the closed form ``counts``, which the other tests compare with counting."""
    sources, phases = run
    sources = {name: Source(source.domain, 128.0) for name, source in sources.items()}
    scale = data.draw(st.integers(1, 100_000))
    phases = [Phase(p.first_sample * scale, p.weights, p.why) for p in phases]
    dealer = Dealer(sources, phases)
    for i in data.draw(st.lists(st.integers(1_000_000 // 128 + 1, 10**9), min_size=5, max_size=20)):
        ends = [*(p.first_sample for p in phases[1:]), i]
        lengths = [max(0, min(end, i) - p.first_sample) for p, end in zip(phases, ends, strict=True)]
        for name, count in dealer.counts(i).items():
            asked = math.fsum(n * p.weights[name] for n, p in zip(lengths, phases, strict=True)) / i
            assert abs(count / i - asked) < 1e-3


def test_tokens_keep_their_shares_where_samples_hold_different_numbers_of_them() -> None:
    """Packed windows of 512 tokens, of which a source of short texts fills 300 on average."""
    sources = {"s0": Source("a", 300.0), "s1": Source("b", 512.0)}
    counts = Dealer(sources, [Phase(0, shares([1, 1]), "config")]).counts(10_000)
    tokens = {name: counts[name] * sources[name].tokens for name in sources}
    assert tokens["s0"] == pytest.approx(tokens["s1"], rel=1e-3) and counts["s0"] > 1.7 * counts["s1"]


@given(runs(), st.sampled_from(["reweight", "stop"]), st.data())
@settings(max_examples=60, deadline=None)
def test_samples_of_a_source_are_numbered_without_gaps_and_caps_are_kept(
    run: tuple[dict[str, Source], list[Phase]], policy: str, data: st.DataObject
) -> None:
    """Across phases; no source is dealt beyond its cap, the end comes only when that cannot be helped, and every number
    is found without those before it."""
    sources, phases = run
    caps = data.draw(st.lists(st.none() | st.integers(1, 400), min_size=len(sources), max_size=len(sources)))
    sources = {n: Source(s.domain, s.tokens, cap) for (n, s), cap in zip(sources.items(), caps, strict=True)}
    dealer = Dealer(sources, phases, policy)  # type: ignore[arg-type]
    last = phases[-1].first_sample + 300
    seen: Counter[str] = Counter()
    for i in range(last if dealer.end is None else min(last, dealer.end)):
        name, j = dealer.locate(i)
        assert j == seen[name] and dealer.history.at(i).weights[name] > 0
        seen[name] += 1
    assert {name: seen[name] for name in sources} == dealer.counts(sum(seen.values()))
    assert all(s.cap is None or seen[name] <= s.cap for name, s in sources.items())
    if dealer.end is not None and dealer.end < last:
        with pytest.raises(DataError, match="past the end of the data"):
            dealer.locate(dealer.end)
        out = [name for name, s in sources.items() if s.cap is not None and seen[name] == s.cap]
        wanted = {name for name, weight in dealer.history.at(dealer.end).weights.items() if weight > 0}
        assert out and (policy == "stop" or wanted <= set(out))


def test_the_share_of_an_exhausted_source_goes_to_its_domain_first() -> None:
    sources = {"a1": Source("a", 1.0, 10), "a2": Source("a", 1.0, 50), "b": Source("b", 1.0), "c": Source("c", 1.0)}
    weights = {"a1": 0.2, "a2": 0.2, "b": 0.4, "c": 0.2}
    dealer = Dealer(sources, [Phase(0, weights, "config")], "reweight")
    first, second, third = dealer.history
    assert (first.why, second.why, third.why) == ("config", "exhausted a1", "exhausted a2")
    assert second.weights == pytest.approx({"a1": 0, "a2": 0.4, "b": 0.4, "c": 0.2})
    assert third.weights == pytest.approx({"a1": 0, "a2": 0, "b": 2 / 3, "c": 1 / 3})
    assert 48 <= second.first_sample <= 58  # 10 samples at 0.2, and the next one
    assert abs(second.first_sample + (50 - dealer.counts(second.first_sample)["a2"]) / 0.4 - third.first_sample) < 4


@pytest.mark.parametrize("first", [0, 20])
def test_what_a_mixer_tries_out_may_run_out(first: int) -> None:
    """A probe of one source alone that reaches its cap, and one of a source that has run out before: the weights of the
    config hold for what is left, and the run goes on. Weights of the config's own that leave nothing end it."""
    sources, even = {name: Source(name, 8.0, cap) for name, cap in (("a", 30), ("b", None), ("c", None))}, 1 / 3
    config, alone = {"a": even, "b": even, "c": even}, {"a": 1.0}
    dealer = Dealer(sources, [Phase(0, config, "config")], "reweight")
    dealer.dealt = first
    dealer.change(first, alone, "mixer test")
    out = first + 30 - dealer.counts(first)["a"]
    dealer.dealt = out + 10
    dealer.change(out + 10, alone, "mixer test")
    dealer.dealt = out + 20
    dealer.change(out + 20, config, "mixer test")
    assert dealer.end is None
    assert {dealer.locate(i)[0] for i in range(first, out)} == {"a"}
    assert Counter(dealer.locate(i)[0] for i in range(out, out + 40)) == {"b": 20, "c": 20}
    whole = {name: alone.get(name, 0.0) for name in sources}
    for i in (out + 5, out + 15):
        assert dealer.left_of(whole, i) == dealer.history.at(i).weights == {"a": 0, "b": 0.5, "c": 0.5}
    assert Dealer(sources, [Phase(0, whole, "config")], "reweight").end == 30


def test_a_change_is_refused_for_dealt_samples_and_for_weights_that_cannot_be_used() -> None:
    dealer = Dealer({name: Source(name, 1.0) for name in names(2)}, [Phase(0, shares([1, 1]), "config")])
    before = [dealer.locate(i) for i in range(100)]
    dealer.dealt = 100
    dealer.change(100, {"s0": 3.0, "s1": 1.0}, "mixer test")
    assert [dealer.locate(i) for i in range(100)] == before
    assert dealer.counts(1100)["s0"] - dealer.counts(100)["s0"] == pytest.approx(750, abs=2)
    for first, weights, message in [
        (99, {"s0": 1.0}, "cannot change at sample 99: 100 samples have been dealt"),
        (100, {"s0": math.nan, "s1": 1.0}, "weight of domain 's0' is nan"),
        (100, {"s0": -1.0, "s1": 1.0}, "weight of domain 's0' is -1"),
        (100, {"s0": 0.0}, "weights of all domains are 0"),
        (100, {"t0": 1.0}, "unknown domain 't0'; known: s0, s1"),
    ]:
        with pytest.raises(DataError, match=message):
            dealer.change(first, weights, "user")
    assert WeightHistory.from_json(dealer.history.to_json()) == dealer.history
