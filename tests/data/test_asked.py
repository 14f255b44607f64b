"""From a config to shares of sources: rules against hand computation, domains, schedules, caps, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from moetrain.config import load
from moetrain.config.check import check_config
from moetrain.config.check_data import check_order
from moetrain.config.errors import ConfigError, DataError
from moetrain.config.schema import Config, TrainConfig
from moetrain.config.schema_data import DataConfig, DomainConfig, MixtureStepConfig, SourceConfig
from moetrain.data.asked import ask
from moetrain.data.dataset import TokenData
from moetrain.data.deal import Dealer, Source
from moetrain.data.forecast import describe, warnings, worth
from moetrain.data.loader import Loader
from moetrain.data.weights import temperature_weights, unimax_weights
from moetrain.train.preflight import open_sampler

TOKENS = {"en": 8000, "de": 1000, "sw": 100}


def config(sources: dict[str, dict[str, Any]], domains: dict[str, dict[str, Any]] | None = None, **data: Any) -> Config:
    given = {name: SourceConfig(**options) for name, options in sources.items()}
    groups = {name: DomainConfig(**options) for name, options in (domains or {}).items()}
    train = TrainConfig(steps=100, global_batch=4, seq_len=10)
    return Config(data=DataConfig(sources=given, domains=groups, **data), train=train)


def test_temperature_is_a_power_of_the_tokens() -> None:
    """Hand computation for T = 2: square roots of 6400, 900 and 100 are 80, 30 and 10."""
    tokens = {"a": 6400.0, "b": 900.0, "c": 100.0}
    assert temperature_weights(tokens, 2) == pytest.approx({"a": 80 / 120, "b": 30 / 120, "c": 10 / 120})
    assert temperature_weights(tokens, 1) == pytest.approx({n: count / 7400 for n, count in tokens.items()})
    assert temperature_weights(tokens, 1e6) == pytest.approx(dict.fromkeys(tokens, 1 / 3), rel=1e-5)


def unimax_by_search(tokens: dict[str, int], budget: int, epochs: int) -> dict[str, float]:
    """Another way to the same shares: the level, in exact fractions, at which what all domains give (the level, or all
    their passes where that is less) is the budget."""
    most = sorted(Fraction(epochs * count) for count in tokens.values())
    if sum(most) <= budget:
        level = most[-1]
    else:
        level = next(
            level
            for n in range(len(most))
            for level in [(budget - sum(most[:n], Fraction(0))) / (len(most) - n)]
            if level <= most[n]
        )
    given = {name: min(level, Fraction(epochs * count)) for name, count in tokens.items()}
    return {name: float(share / sum(given.values())) for name, share in given.items()}


@pytest.mark.parametrize(("budget", "epochs"), [(100, 1), (300, 1), (1000, 1), (3000, 2), (9000, 4), (10**6, 4)])
def test_unimax_is_the_evenest_mixture_that_repeats_nothing_too_often(budget: int, epochs: int) -> None:
    found = unimax_weights(TOKENS, budget, epochs)
    assert found == pytest.approx(unimax_by_search(TOKENS, budget, epochs))
    if budget <= epochs * sum(TOKENS.values()):
        assert all(found[name] * budget <= epochs * count * (1 + 1e-9) for name, count in TOKENS.items())


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ("proportional", {"en": 80 / 91, "de": 10 / 91, "sw": 1 / 91}),
        ("uniform", {"en": 1 / 3, "de": 1 / 3, "sw": 1 / 3}),
        ("temperature", temperature_weights(TOKENS, 5)),
        ("unimax", unimax_by_search(TOKENS, 4000, 2)),  # 100 steps of 4 x 10 tokens
        ("given", {"en": 0.7, "de": 0.3 * 10 / 11, "sw": 0.3 / 11}),
    ],
)
def test_a_rule_takes_the_place_of_given_weights_and_zero_stays_out(mixture: str, expected: dict[str, float]) -> None:
    sources = {"en": {"weight": 0.7}, "de": {}, "sw": {}, "none": {"weight": 0}}
    cfg = config(sources, mixture=mixture, temperature=5.0, unimax_epochs=2.0)
    assert ask(cfg, TOKENS | {"none": 10**6}).phases[0].weights == pytest.approx(expected | {"none": 0})


def test_domains_of_several_sources() -> None:
    """cc and wiki share the web's 0.6 as 3 to 1; books has two sources without weights, in proportion to their tokens;
    a source that is alone in its domain has the domain's weight, whichever of the two places it was given in."""
    sources = {
        "cc": {"domain": "web", "weight": 3},
        "wiki": {"domain": "web", "weight": 1},
        "old": {"domain": "books"},
        "new": {"domain": "books"},
        "go": {"domain": "code"},
        "talk": {"weight": 0.1},
    }
    tokens = {"cc": 500, "wiki": 500, "old": 100, "new": 300, "go": 50, "talk": 50}
    cfg = config(sources, {"web": {"weight": 0.6}, "books": {"weight": 0.2}, "code": {"weight": 0.1}})
    expected = {"cc": 0.45, "wiki": 0.15, "old": 0.05, "new": 0.15, "go": 0.1, "talk": 0.1}
    assert ask(cfg, tokens).phases[0].weights == pytest.approx(expected)
    rest = config(sources, {"web": {"weight": 0.6}})  # books and code share 0.3 as 400 to 50
    assert ask(rest, tokens).phases[0].weights["go"] == pytest.approx(0.3 / 9)


def test_a_schedule_changes_some_weights_and_the_others_share_the_rest() -> None:
    sources = {"cc": {"domain": "web"}, "wiki": {"domain": "web"}, "math": {"weight": 0.2}, "code": {"weight": 0.2}}
    schedule = [
        MixtureStepConfig(weights={"math": 0.6}, from_step=10),
        MixtureStepConfig(weights={"wiki": 0.5}, from_tokens=1005),
        MixtureStepConfig(weights={"web": 1.0, "math": 0.0, "code": 1.0}, from_step=50),
    ]
    asked = ask(config(sources, schedule=schedule), {"cc": 900, "wiki": 100, "math": 5, "code": 5})
    first, second, third, fourth = asked.phases
    assert first.weights == pytest.approx({"cc": 0.54, "wiki": 0.06, "math": 0.2, "code": 0.2})
    assert (second.first_sample, third.first_sample, fourth.first_sample) == (40, 101, 200)
    assert second.weights == pytest.approx({"cc": 0.27, "wiki": 0.03, "math": 0.6, "code": 0.1})
    assert third.weights == pytest.approx({"cc": 0.15, "wiki": 0.15, "math": 0.6, "code": 0.1})
    assert fourth.weights == pytest.approx({"cc": 0.25, "wiki": 0.25, "math": 0, "code": 0.5})
    assert asked.weights_at(100) == second.weights and asked.weights_at(101) == third.weights
    too_much = config(sources, schedule=[MixtureStepConfig(weights={"math": 1.2}, from_step=1)])
    with pytest.raises(DataError, match=r"data.schedule\[0\]: the given weights sum to 1.2 and leave nothing for"):
        ask(too_much, dict.fromkeys(sources, 9))


def test_caps_are_those_of_the_source_its_domain_or_all() -> None:
    sources = {"a": {"domain": "d"}, "b": {"domain": "d", "max_epochs": 3}, "c": {}}
    caps = ask(config(sources, {"d": {"max_epochs": 2}}, max_epochs=7.5), dict.fromkeys(sources, 9)).max_epochs
    assert caps == {"a": 2, "b": 3, "c": 7.5}


REFUSED = {
    "+data.sources.playz.weight=1": "data.sources.playz has no paths; did you mean 'plays'",
    "data.sources.plays.weight=-1": "data.sources.plays.weight=-1.0 must be a share of 0 or more",
    "data.sources.plays.weight=.nan": "data.sources.plays.weight",
    "data.sources.plays.max_epochs=0": "data.sources.plays.max_epochs",
    "+data.domains.play.weight=1": "no source belongs to domain 'play'; did you mean 'plays'",
    "+data.domains.plays.weight=-2": "data.domains.plays.weight=-2.0 must be a share of 0 or more",
    "data.mixture=unimx": "unimax",
    "data.temperature=0": "data.temperature",
    "data.exhausted=stop": "data.exhausted=stop needs to know when data has run out; set data.max_epochs",
    "data.exhausted=halt": "data.exhausted",
    "data.schedule=[{weights: {plays: 1}}]": r"data.schedule\[0\] needs from_step or from_tokens, one of them",
    "data.schedule=[{weights: {plays: 1}, from_step: 1, from_tokens: 9}]": r"data.schedule\[0\] needs from_step or",
    "data.schedule=[{weights: {plaise: 1}, from_step: 1}]": "did you mean 'plays'",
    "data.schedule=[{weights: {plays: -1}, from_step: 1}]": "must be a share of 0 or more",
    "data.schedule=[{weights: {}, from_step: 1}]": "weights is empty",
    "data.schedule=[{weights: {plays: 1}, from_step: 0}]": "must begin later than the start",
    "data.schedule=[{weights: {plays: .5}, from_step: 9}, {weights: {plays: .5}, from_tokens: 300}]":
        r"data.schedule\[1\] must begin later than data.schedule\[0\]",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_refused_before_anything_starts(words: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[words]):
        load(["experiment=demo", words])


def test_a_resumed_run_tells_which_entry_of_the_schedule_comes_first() -> None:
    """100 steps of 8 samples, then steps of 4: step 150 begins with sample 1000, not 600; ten tokens are a sample."""
    step, tokens = ({"weights": {"a": 0.5}, "from_step": 150}, {"weights": {"a": 0.7}, "from_tokens": 9000})
    before, same = {"weights": {"a": 0.6}, "from_step": 99}, {"weights": {"a": 0.7}, "from_tokens": 6000}
    sources: dict[str, dict[str, Any]] = {"a": {}, "b": {}}

    def scheduled(*entries: dict[str, Any]) -> Config:
        return config(sources, schedule=[MixtureStepConfig(**entry) for entry in entries])

    good = scheduled(before, tokens, step)
    with pytest.raises(ConfigError, match=r"data\.schedule\[2\] must begin later than data\.schedule\[1\]"):
        check_config(good)  # as a run of its own
    check_config(good, resumed=True)
    check_order(good, 100, 800)
    assert [phase.first_sample for phase in ask(good, {"a": 9, "b": 9}, 100, 800).phases] == [0, 796, 900, 1000]
    for bad in (scheduled(step, tokens), scheduled(tokens, before)):
        check_config(bad, resumed=True)
        with pytest.raises(ConfigError, match="must begin later"):
            check_order(bad, 100, 800)
    check_order(scheduled({**tokens, "from_tokens": 400}, before), 100, 800)  # both have begun
    asked = ask(scheduled(same, step), {"a": 9, "b": 9})  # both at sample 600, as far as the config alone can tell
    dealer = Dealer({name: Source(name, 10.0) for name in sources}, asked.phases)
    assert [phase.first_sample for phase in dealer.history] == [0, 600]


def test_two_weights_for_one_domain_and_a_domain_of_nothing_are_refused() -> None:
    from moetrain.config.check_data import check_data

    with pytest.raises(ConfigError, match="both give the weight of domain 'd', which has one source"):
        check_data(config({"a": {"domain": "d", "weight": 1}}, {"d": {"weight": 1}}))
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.weight=1, but all its sources have weight 0"):
        check_data(config({"a": {"domain": "d", "weight": 0}, "b": {"domain": "d", "weight": 0}}, {"d": {"weight": 1}}))
    with pytest.raises(DataError, match="the weights of all domains are 0"):
        ask(config({"a": {"weight": 0}, "b": {"weight": 0}}, mixture="uniform"), {"a": 1, "b": 1})


def test_repeated_text_is_worth_less() -> None:
    """The law's published fit: 4 passes are nearly as good as new text, 40 are worth 15."""
    assert worth(0.5) == 0.5 and worth(1) == 1
    assert worth(4) == pytest.approx(3.73, abs=0.01) and worth(40) == pytest.approx(15.17, abs=0.01)


def small(data: TokenData, tmp_path: Path, **options: Any) -> Loader:
    """A loader of 50 steps of 8 samples of 32 tokens over the small corpus."""
    sources = {name: SourceConfig(weight=1.0) for name in data.sources}
    train = TrainConfig(steps=50, global_batch=8, micro_batch=8, seq_len=32)
    cfg = Config(data=DataConfig(sources=sources, **options), train=train)
    return Loader(data, open_sampler(cfg, data)[0], 8, 8, prefetch=0)


def test_what_will_happen_is_said_up_front(data: TokenData, tmp_path: Path) -> None:
    """A tenth of the smallest source, and the step that needs more of it, found by counting."""
    cap = (len(data.tokens("sea")) - 1) // 32 // 10
    passes = f"{cap / ((len(data.tokens('sea')) - 1) // 32):.3g} passes"
    plain = small(data, tmp_path)
    assert describe(plain, 0, 50) == ["sea 33.3%, code 33.3%, food 33.3%"]
    loader = small(data, tmp_path, max_epochs=0.1)
    second = describe(loader, 0, 50)[1]
    at = next(i for i in range(400) if plain.sampler.dealer.counts(i + 1)["sea"] > cap)
    assert second == f"'sea' runs out at step {at // 8} of 50, after {passes}; its share goes to the others: " + (
        "code 50%, food 50%, sea 0%"
    )
    stop = small(data, tmp_path, max_epochs=0.1, exhausted="stop")
    assert describe(stop, 0, 50)[1] == (
        f"the data runs out at step {at // 8} of 50: 'sea' after {passes} (data.exhausted=stop)"
    )
    assert warnings(plain, 50) == [] and "'sea' is repeated" in warnings(plain, 500)[0]
