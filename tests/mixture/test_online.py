"""Mixers without a model: each update rule beside a computation of its own, on losses whose law is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moetrain.config import load, read, save, to_dict
from moetrain.config.errors import ConfigError
from moetrain.config.registry import MIXERS
from moetrain.mixture.online import Decision, Mixer, Observation, build_mixer, on_grid

DOMAINS = ["sea", "code", "food"]
UNIFORM = dict.fromkeys(DOMAINS, 1 / 3)


def build(kind: str, domains: list[str] = DOMAINS, **options: Any) -> Mixer:
    entry = MIXERS.get(kind)
    mixer: Mixer = entry.build(entry.options(**options), domains, 7)
    return mixer


def play(mixer: Mixer, see: Callable[[Decision], Observation], decisions: int) -> list[Decision]:
    """The first ``decisions`` decisions from uniform weights; ``see`` trains as one says and measures."""
    even = dict.fromkeys(mixer.domains, 1 / len(mixer.domains))
    made = [mixer.start(even)]
    while len(made) < decisions:
        made.append(mixer.decide(see(made[-1])))
    return made


class Linear:
    """Losses that follow L(t+1) = L(t) - A p."""

    def __init__(self, a_kk: np.ndarray, losses_k: np.ndarray) -> None:
        self.a_kk, self.losses_k, self.steps = a_kk, losses_k, 0

    def __call__(self, decision: Decision) -> Observation:
        p_k = np.array([decision.weights[name] for name in DOMAINS])
        self.losses_k = self.losses_k - decision.steps * self.a_kk @ (p_k / p_k.sum())
        self.steps += decision.steps
        return Observation(10_000 - self.steps, dict(zip(DOMAINS, self.losses_k.tolist(), strict=True)))


@pytest.mark.parametrize("one_hot", [1.0, 0.6])
@pytest.mark.parametrize("lowest", [0.001, -0.004])
def test_aioli_recovers_the_law_and_steps_along_it(one_hot: float, lowest: float) -> None:
    """Probes on smoothed mixtures give back A exactly where the law holds exactly, domains that harm others (negative
    entries) included; weights go on multiplicatively from round to round, as in algorithm 1 of the paper."""
    a_kk = np.array([[0.010, 0.002, lowest], [0.003, 0.020, 0.001], [0.001, 0.004, 0.006]])
    mixer = build("aioli", every=60, sweeps=3, probe_steps=4, eta=0.5, one_hot=one_hot)
    made = play(mixer, Linear(a_kk, np.array([5.0, 6.0, 7.0])), 1 + 2 * 10)
    final = [made[10], made[20]]
    positive_kk = a_kk - min(a_kk.min(), 0)
    p_k = np.full(3, 1 / 3)
    for decision in final:
        law = np.array([[decision.notes["law"][i][j] for j in DOMAINS] for i in DOMAINS])
        np.testing.assert_allclose(law, a_kk, rtol=1e-9, atol=1e-12)
        p_k = p_k * np.exp(0.5 * positive_kk.sum(0) / positive_kk.sum())
        p_k /= p_k.sum()
        np.testing.assert_allclose([decision.weights[n] for n in DOMAINS], p_k, rtol=1e-9)
    assert sum(d.steps for d in made[1:11]) == sum(d.steps for d in made[11:21]) == 60
    probed = [max(d.weights, key=lambda n: d.weights[n]) for d in made[1:10]]
    assert all(sorted(probed[i : i + 3]) == sorted(DOMAINS) for i in (0, 3, 6)), "each sweep probes each domain once"
    assert all(max(d.weights.values()) == pytest.approx(one_hot) for d in made[1:10])


def test_aioli_averages_the_law_and_begins_no_round_that_cannot_end() -> None:
    first, second = np.diag([0.03, 0.02, 0.01]), np.diag([0.01, 0.02, 0.03])
    world = Linear(first, np.array([5.0, 6.0, 7.0]))
    mixer = build("aioli", every=20, sweeps=1, probe_steps=2, eta=1.0, one_hot=0.8, ema=0.25)
    made = play(mixer, world, 5)
    world.a_kk = second
    one = made[-1]
    for _ in range(4):
        made.append(mixer.decide(world(made[-1])))
    p_k = np.array([one.weights[n] for n in DOMAINS])
    mean_kk = 0.75 * second / second.sum() + 0.25 * first / first.sum()
    p_k = p_k * np.exp(mean_kk.sum(0))
    np.testing.assert_allclose([made[-1].weights[n] for n in DOMAINS], p_k / p_k.sum(), rtol=1e-9)
    held = mixer.decide(Observation(6, world(made[-1]).losses))
    assert (held.weights, held.steps) == (made[-1].weights, 6)


def test_dga_finds_the_domain_that_leads_to_the_target() -> None:
    """Quadratic losses |x - c|^2 / 2, whose gradients are x - c: products by hand, weights by the formula."""
    centres = {"sea": np.array([1.0, 0.0]), "code": np.array([0.0, 1.0]), "food": np.array([-1.0, -1.0])}
    target, x = np.array([0.9, 0.1]), np.zeros(2)
    points = []

    def see(decision: Decision) -> Observation:
        nonlocal x
        for _ in range(decision.steps):
            x = x - 0.01 * sum(decision.weights[n] * (x - centres[n]) for n in DOMAINS)
        points.append(x)
        products = {n: float((x - centres[n]) @ (x - target)) for n in DOMAINS}
        return Observation(1000, products=products)

    made = play(build("dga", every=10, eta=0.7, ema=0.3), see, 12)
    alpha, average = np.full(3, 1 / 3), np.full(3, 1 / 3)
    for decision, at in zip(made[1:], points, strict=True):
        alpha = alpha * np.exp(0.7 * np.array([(at - centres[n]) @ (at - target) for n in DOMAINS]))
        alpha /= alpha.sum()
        average = 0.3 * average + 0.7 * alpha
        np.testing.assert_allclose([decision.weights[n] for n in DOMAINS], average, rtol=1e-9)
    assert max(made[-1].weights, key=lambda n: made[-1].weights[n]) == "sea"
    assert {d.steps for d in made} == {10}


def test_doremi_by_hand() -> None:
    """Two domains, one of them better than the reference: its excess is 0, not negative."""
    mixer = build("doremi", ["a", "b"], reference={"a": 2.0, "b": 3.0, "c": 9.0}, every=5, eta=1.0, smoothing=0.1)
    losses = iter([{"a": 2.5, "b": 2.0}, {"a": 2.2, "b": 3.4}])
    made = play(mixer, lambda _: Observation(100, next(losses)), 3)
    a = 0.9 * (math.exp(0.5) / (math.exp(0.5) + 1)) + 0.05
    assert made[1].weights == pytest.approx({"a": a, "b": 1 - a})
    b = 0.9 * ((1 - a) * math.exp(0.4) / (a * math.exp(0.2) + (1 - a) * math.exp(0.4))) + 0.05
    assert made[2].weights == pytest.approx({"a": 1 - b, "b": b})
    assert made[2].notes["mean"] == pytest.approx({"a": (a + 1 - b) / 2, "b": (1 - a + b) / 2})


def test_a_finished_run_is_the_reference_of_doremi(tmp_path: Path) -> None:
    """Its losses are taken from its summary, once: a run that has begun knows them when that run is gone. Evaluated on
    windows of another length or number they are refused."""
    domains = ["plays", "novels", "jargon", "docs", "code"]
    save(load(["train.eval_sequences=8", "train.seq_len=64"]), tmp_path / "config.yaml")
    losses = {name: 3.0 + i for i, name in enumerate(domains)}
    (tmp_path / "summary.json").write_text(json.dumps({"val_loss_by_domain": losses}))
    words = ["mixer=doremi", f"mixer.reference_run={tmp_path}", "train.seq_len=64"]
    cfg = load([*words, "train.eval_sequences=8"])
    mixer = MIXERS.get("doremi").build(cfg.mixer, domains, 0)
    assert mixer.reference == losses
    summary, kept = (tmp_path / "summary.json").read_text(), tmp_path / "begun.yaml"
    save(cfg, kept)
    (tmp_path / "summary.json").unlink()
    assert to_dict(load(base=kept)) == to_dict(read(kept)) == to_dict(cfg)
    (tmp_path / "summary.json").write_text(summary.replace("3.0", "NaN"))
    with pytest.raises(ConfigError, match="its loss of 'plays' is nan"):
        load([*words, "train.eval_sequences=8"])
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(ConfigError, match=r"mixer\.sequences is 0, but .* was evaluated with 8"):
        load(words)
    with pytest.raises(ConfigError, match=r"train\.seq_len is 32, but .* was evaluated with 64"):
        load([*words, "train.eval_sequences=8", "train.seq_len=32"])
    with pytest.raises(ConfigError, match="has losses on held-out text"):
        load([*words, "train.eval_sequences=8", "mixer.text=train"])


def test_skill_it_with_the_published_graph() -> None:
    """The graph of arXiv and StackExchange that the authors of Aioli measured for their runs of Skill-it."""
    graph = {"arxiv": {"arxiv": 0.758, "se": 0.522}, "se": {"arxiv": 0.668, "se": 0.719}}
    a_kk = np.array([[0.758, 0.522], [0.668, 0.719]])
    losses = np.array([[4.0, 4.5], [3.5, 4.1], [3.2, 3.9], [3.0, 3.8]])
    rows = iter(losses)
    mixer = build("skill_it", ["arxiv", "se"], graph=graph, eta=0.2, window=3, every=400)
    made = play(mixer, lambda _: Observation(9999, dict(zip(["arxiv", "se"], next(rows).tolist(), strict=True))), 5)
    sums = [np.ones(2), *(losses[max(0, n - 3) : n].sum(0) for n in range(1, 5))]
    for decision, sum_k in zip(made, sums, strict=True):
        expected = np.exp(0.2 * a_kk @ sum_k)
        np.testing.assert_allclose(list(decision.weights.values()), expected / expected.sum(), rtol=1e-12)


def test_skill_it_learns_a_graph_by_probes() -> None:
    """Training on one domain alone takes a known share off each loss; what makes a loss worse is no edge."""
    share = {"sea": [0.1, 0.02, -0.05], "code": [0.0, 0.2, 0.04], "food": [0.03, 0.0, 0.06]}
    losses_k = np.array([5.0, 6.0, 7.0])

    def see(decision: Decision) -> Observation:
        nonlocal losses_k
        if decision.steps == 9:
            [one] = [name for name in DOMAINS if decision.weights[name] == 1]
            losses_k = losses_k * (1 - np.array(share[one]))
        return Observation(500, dict(zip(DOMAINS, losses_k.tolist(), strict=True)))

    made = play(build("skill_it", probe_steps=9, every=30), see, 5)
    learnt = made[-1].notes["graph"]
    for name in DOMAINS:
        assert list(learnt[name].values()) == pytest.approx([max(x, 0.0) for x in share[name]])
    assert [d.steps for d in made] == [0, 9, 9, 9, 30]
    gains = np.array([[max(x, 0.0) for x in share[n]] for n in DOMAINS]) @ losses_k
    expected = np.exp(0.2 * gains)
    np.testing.assert_allclose(list(made[-1].weights.values()), expected / expected.sum(), rtol=1e-9)


KINDS: dict[str, dict[str, Any]] = {
    "aioli": {"every": 30, "sweeps": 2, "ema": 0.5},
    "dga": {"ema": 0.2},
    "doremi": {"reference": {"sea": 1.0, "code": 2.0, "food": 1.5}},
    "skill_it": {"probe_steps": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_all_that_a_decision_depends_on(kind: str) -> None:
    """A mixer that is saved as JSON and made anew before every decision decides the same, bit for bit."""
    rng = np.random.default_rng(1)

    def see(decision: Decision) -> Observation:
        values = [dict(zip(DOMAINS, rng.uniform(1, 4, 3).tolist(), strict=True)) for _ in range(3)]
        return Observation(1000, *values)

    steady = build(kind, **KINDS[kind])
    made = [steady.start(UNIFORM)]
    copy = build(kind, **KINDS[kind])
    copy.start(UNIFORM)
    for _ in range(20):
        seen = see(made[-1])
        made.append(steady.decide(seen))
        state = json.loads(json.dumps(copy.state()))
        copy = build(kind, **KINDS[kind])
        copy.load_state(state)
        assert copy.decide(seen) == made[-1]
    assert json.dumps(copy.state()) == json.dumps(steady.state())


def test_weights_on_the_grid_sum_to_one_and_swallow_rounding() -> None:
    rng = np.random.default_rng(2)
    for k in (2, 3, 17):
        weights = {str(i): float(w) for i, w in enumerate(rng.dirichlet(np.ones(k)) * 3)}
        rounded = on_grid(weights)
        assert round(sum(w * 1_000_000 for w in rounded.values())) == 1_000_000
        assert all(abs(rounded[n] - weights[n] / 3) < 1e-6 for n in weights)
        assert on_grid({n: w * (1 + 1e-13 * i) for i, (n, w) in enumerate(weights.items())}) == rounded


def test_presets_are_known_kinds_with_legal_values(tmp_path: Path) -> None:
    for kind in MIXERS.names():
        if kind.startswith("steady"):
            continue  # of another test
        cfg = load([f"mixer={kind}"])
        save(cfg, tmp_path / "config.yaml")
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["mixer"] == to_dict(cfg)["mixer"]
        assert to_dict(cfg)["mixer"]["kind"] == kind


def test_a_mixer_can_be_taken_out_on_resume(tmp_path: Path) -> None:
    save(load(["mixer=dga", "train.steps=2000", "mixer.eta=0.5"]), tmp_path / "config.yaml")
    assert to_dict(load(["mixer.eta=2"], base=tmp_path / "config.yaml"))["mixer"]["eta"] == 2
    assert to_dict(load(["~mixer"], base=tmp_path / "config.yaml"))["mixer"] == {"kind": "none"}


WRONG = [
    (["mixer=aiol"], "no preset of mixer is called 'aiol'; did you mean 'aioli'?"),
    (
        ["mixer=dga", "mixer.target=[cod]"],
        "mixer.target names 'cod', which is no domain of the data; did you mean 'code'",
    ),
    (["mixer=dga", "mixer.target=[]"], "mixer.target is empty"),
    (["mixer=dga", "mixer.every=0"], "mixer.every takes int >= 1; got 0"),
    (["mixer=aioli", "mixer.probe_steps=0"], "mixer.probe_steps takes int >= 1"),
    (["mixer=aioli", "mixer.one_hot=1.5"], "mixer.one_hot takes float > 0 and <= 1"),
    (["mixer=dga", "mixer.sequences=64"], "mixer.sequences=64 is more than train.global_batch=8"),
    (["mixer=dga", "mixer.sequences=1", "mixer.target=[code,docs]"], "has 2 names for the 1 sequences"),
    (["mixer=dga", "parallel.engine=deepspeed"], "parallel.engine=deepspeed does not keep"),
    (["mixer=doremi", "mixer.reference={code: 3.0}", "mixer.reference_run=x"], "not both"),
    (["mixer=doremi", "mixer.reference={prose: 3.0}"], "mixer.reference names 'prose', which is no domain"),
    (["mixer=doremi", "mixer.reference={code: -3.0}"], "mixer.reference"),
    (
        ["mixer=doremi", "mixer.reference_run=nowhere"],
        "mixer.reference_run=nowhere is not the directory of a finished run",
    ),
    (["mixer=skill_it", "mixer.graph={code: {cod: 1}}"], "mixer.graph names 'cod'"),
    (["mixer=aioli", "data.schedule=[{from_step: 5, weights: {code: 0.5}}]"], "data.schedule must be empty"),
    (["mixer.eta=1"], "mixer.eta is not a setting"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_settings_are_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(["train.steps=2000", *words])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("aioli", {"every": 48}, "leaves no steps beside the probes of 3 domains: 4 sweeps x 4 steps x 3 = 48"),
        ("aioli", {"one_hot": 0.3}, "must be more than an even share, 1/3"),
        ("doremi", {}, "needs the losses of a reference model"),
        ("doremi", {"reference": {"sea": 1.0, "code": 2.0}}, "has no loss of food"),
        ("skill_it", {"graph": {"sea": {"sea": 1.0}}}, "mixer.graph.sea lacks code, food"),
    ],
)
def test_options_that_do_not_fit_the_domains(kind: str, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, **options)


class Shares:
    """A sampler, as far as a mixer asks it."""

    def __init__(self, **shares: float) -> None:
        self.shares = shares

    def domain_weights(self, i: int) -> dict[str, float]:
        return self.shares


@pytest.mark.parametrize(
    ("words", "shares", "message"),
    [
        (
            ["mixer=dga", "mixer.every=50"],
            {"sea": 1.0, "code": 0.0},
            "needs two domains with weight or more; there is sea",
        ),
        (["mixer=dga"], {"sea": 0.5, "code": 0.5}, "first change the weights at step 100, which train.steps=100"),
        (["mixer=aioli", "mixer.start_step=70"], {"sea": 0.5, "code": 0.5}, "at step 102"),
        (["mixer=skill_it", "mixer.start_step=100", "mixer.probe_steps=1"], {"a": 0.5, "b": 0.5}, "at step 102"),
    ],
)
def test_mixers_that_could_decide_nothing(words: list[str], shares: dict[str, float], message: str) -> None:
    sampler: Any = Shares(**shares)
    with pytest.raises(ConfigError, match=message):
        build_mixer(load(words), sampler)
    assert build_mixer(load([]), sampler) is None
