"""Online mixers in training: what they measure is right under every mapping, and measuring disturbs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from pydantic import Field
from pydantic.dataclasses import dataclass

from moetrain.config.check import check_mapping, resolve_sizes
from moetrain.config.fields import STRICT
from moetrain.config.registry import MIXERS
from moetrain.config.schema import Config
from moetrain.data.order import seed_key
from moetrain.mixture.online import Cost, Decision, Mixer, MixerOptions, Observation
from moetrain.model.decoder import Decoder
from moetrain.train.mixing import draw_windows
from moetrain.train.trainer import Trainer
from moetrain.train.whole import whole_weights
from tests.distributed.toy_run import SIGMOID, SOFTMAX, load

EXACT = ["train.precision=float64"]
# A mixer of each kind that decides often in a short run of the two domains of the toy text.
OFTEN: dict[str, dict[str, Any]] = {
    "aioli": {"every": 6, "sweeps": 1, "probe_steps": 2, "eta": 0.5},
    "dga": {"every": 3, "target": ["digits"], "sequences": 6},
    "doremi": {"every": 3, "reference": {"letters": 3.0, "digits": 5.0}},
    "skill_it": {"every": 4, "probe_steps": 2, "eta": 2.0},
}


@dataclass(config=STRICT)
class SteadyLossesOptions(MixerOptions):
    """For the test."""

    target: list[str] | None = Field(default=None, description="domains of the target")


@MIXERS.register("steady_losses", SteadyLossesOptions)
class SteadyLosses(Mixer):
    """Measures in every step, and never changes the weights."""

    def start(self, prior: Mapping[str, float]) -> Decision:
        self.prior = dict(prior)
        return Decision(self.prior, 0)

    def decide(self, seen: Observation) -> Decision:
        return Decision(self.prior, 1, {"seen": dict(seen.losses or seen.products)})

    def state(self) -> dict[str, Any]:
        return {"prior": self.prior}

    def load_state(self, state: dict[str, Any]) -> None:
        self.prior = state["prior"]

    def cost(self) -> Cost:
        return Cost(1, evaluations=1)


@dataclass(config=STRICT)
class SteadyGradientsOptions(SteadyLossesOptions):
    """For the test."""


@MIXERS.register("steady_gradients", SteadyGradientsOptions)
class SteadyGradients(SteadyLosses):
    """The same, of gradients."""

    wants = "gradients"


def build(cfg: Config) -> Trainer:
    return Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))


def train(cfg: Config, steps: int) -> list[dict[str, Any]]:
    trainer = build(cfg)
    return [trainer.train_step() for _ in range(steps)]


def mixed(folder: Path, kind: str, words: list[str], run_dir: Path | None = None, **options: Any) -> Config:
    """The toy run from uniform weights with a mixer."""
    cfg = load(folder, words)
    cfg.data.mixture = "uniform"
    cfg.mixer = MIXERS.get(kind).options(**(options or OFTEN.get(kind, {})))
    cfg.run_dir = str(run_dir or cfg.run_dir)
    return cfg


@pytest.mark.parametrize(("routing", "text"), [(SOFTMAX, "held_out"), (SIGMOID, "train")], ids=["aux_loss", "bias"])
def test_measuring_disturbs_nothing(prepared: Path, routing: list[str], text: str) -> None:
    """Measuring losses, or gradients, before each step: every figure of every step and every weight is bit for bit what
    it is without a mixer, whatever balances the experts."""

    def end(cfg: Config) -> Any:
        trainer = build(cfg)
        rows = [trainer.train_step() for _ in range(4)]
        figures = [{k: v for k, v in r.items() if k not in ("step_s", "data_wait_s", "mixer_s")} for r in rows]
        return figures, dict(whole_weights(trainer.engine, trainer.dims))

    words = [*routing, "train.micro_batch=4", "model.moe.capacity_factor=1.5", "model.moe.drop_policy=random"]
    [(plain, weights)] = run_ranks(1, end, mixed(prepared, "none", words))
    for kind in ("steady_losses", "steady_gradients"):
        [(rows, same)] = run_ranks(1, end, mixed(prepared, kind, words, text=text))
        seen = [row.pop("mixer")["seen"] for row in rows]
        assert all(row.pop("mixture").keys() == {"letters", "digits"} for row in rows)
        assert rows == plain
        assert len({json.dumps(s) for s in seen}) == 4, "it has measured something"
        assert same.keys() == weights.keys() and all(torch.equal(same[name], weights[name]) for name in weights)


def test_gradient_products_are_those_of_autograd(prepared: Path) -> None:
    """Beside gradients that autograd takes of a bare decoder with the same weights, in float64, on the same windows."""

    def both(cfg: Config) -> Any:
        trainer = build(cfg)
        data, n = trainer.data, cfg.train.seq_len
        seen = trainer.mixing.before_step(0, 9)["mixer"]["seen"]
        bare = Decoder(cfg.model, cfg.balance, cfg.experts).double()
        bare.load_state_dict(dict(whole_weights(trainer.engine, trainer.dims)))

        def gradient(what: str, shares: dict[str, float], split: Any) -> torch.Tensor:
            windows = draw_windows(data, shares, 8, n, seed_key(cfg.seed, "mixer", what, 0), split)
            assert len(set(windows)) == 8
            texts = [data.tokens(source, split)[start : start + n + 1].astype("int64") for source, start in windows]
            losses = [bare(torch.tensor(t[None, :-1]), torch.tensor(t[None, 1:]))[0] for t in texts]
            loss = torch.stack(losses).sum() / sum(len(t) - 1 for t in texts)
            parts = torch.autograd.grad(loss, list(bare.parameters()), materialize_grads=True)
            return torch.cat([part.flatten() for part in parts])

        target = gradient("target", {"digits": 1.0}, "val")
        found = {}
        for name in ("letters", "digits"):
            own = gradient(name, {name: 1.0}, "train")
            found[name] = float(own @ target) / max(1.0, float(own.norm())) / max(1.0, float(target.norm()))
        return seen, found

    cfg = mixed(prepared, "steady_gradients", [*EXACT, "train.micro_batch=4"], target=["digits"])
    [(seen, found)] = run_ranks(1, both, cfg)
    assert seen == pytest.approx(found, rel=1e-9)


MAPPINGS = {
    "fsdp and ep": ["parallel.ep=2", "train.micro_batch=4"],
    "hsdp": ["parallel.dp_replicate=2", "train.micro_batch=2"],
    "tp": ["parallel.tp=2", "train.micro_batch=8"],
    "pp": ["parallel.pp=2", "train.micro_batch=2"],  # four micro-batches, of which a gradient's sequences fill three
}


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_decisions_do_not_depend_on_the_mapping(prepared: Path, mapping: str) -> None:
    """DGA, which needs gradients of the whole model, on two ranks and on one: products within 1e-9 in float64, the same
    weights, and the same losses after them; all ranks alike."""
    words = [*EXACT, *SOFTMAX]
    cfg = mixed(prepared, "dga", [*words, *MAPPINGS[mapping]])
    check_mapping(cfg, 2)
    two = run_ranks(2, train, cfg, 7)
    [one] = run_ranks(1, train, mixed(prepared, "dga", [*words, "train.micro_batch=8"]), 7)
    assert [row["mixture"] for row in two[0] if "mixture" in row] == [r["mixture"] for r in two[1] if "mixture" in r]
    decided = 0
    for mine, theirs in zip(two[0], one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert mine.get("mixture") == theirs.get("mixture")
        products = theirs.get("mixer", {}).get("products", {})
        if products:
            assert mine["mixer"]["products"] == pytest.approx(products, rel=1e-8)
            assert mine["mixer"]["cosines"] == pytest.approx(theirs["mixer"]["cosines"], rel=1e-8)
            decided += 1
    assert decided == 2 and len({json.dumps(row["mixture"]) for row in one if "mixture" in row}) == 3


@pytest.mark.parametrize("kind", OFTEN)
def test_a_resumed_run_decides_the_same(prepared: Path, tmp_path: Path, kind: str) -> None:
    """Trained to the end at once, or stopped in mid-round (for Aioli and Skill-it: between two probes) and resumed: the
    same weights, losses and samples, bit for bit; metrics.jsonl has every decision; samples follow the weights."""

    def whole(cfg: Config) -> Any:
        trainer = build(cfg)
        trainer.fit()
        return trainer.sampler.history.to_json()

    def cut(cfg: Config) -> None:
        trainer = build(cfg)
        for _ in range(5):
            trainer.train_step()
        trainer.checkpointer.save(5, trainer.engine.state(trainer.progress()))
        trainer.checkpointer.wait()
        trainer.train_step()  # what is done after the checkpoint is lost

    def resumed(cfg: Config) -> Any:
        trainer = build(cfg)
        trainer.resume()
        assert trainer.step == 5
        rows = [trainer.train_step() for _ in range(9)]
        counts = trainer.sampler.dealer.counts(14 * 8)
        return rows, trainer.sampler.history.to_json(), counts

    words = ["train.micro_batch=8", "train.steps=14"]
    (tmp_path / "whole").mkdir()
    [history] = run_ranks(1, whole, mixed(prepared, kind, words, tmp_path / "whole"))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    run_ranks(1, cut, mixed(prepared, kind, words, tmp_path / "cut"))
    [(again, same_history, counts)] = run_ranks(1, resumed, mixed(prepared, kind, words, tmp_path / "cut"))
    for key in ("loss", "grad_norm", "mixture", "mixer"):
        assert [row.get(key) for row in rows[5:]] == [row.get(key) for row in again], key
    assert same_history == history
    decided = [row["mixture"] for row in rows if "mixture" in row]
    assert len(decided) >= 4 and len({json.dumps(d) for d in decided}) >= 3
    assert {phase["why"] for phase in history} <= {"config", f"mixer {kind}"}
    held = [next(p for p in reversed(history) if p["first_sample"] <= i)["weights"] for i in range(14 * 8)]
    assert all(abs(count - sum(w[name] for w in held)) < 2 for name, count in counts.items())


def test_a_mixer_goes_on_after_a_domain_has_run_out(prepared: Path, tmp_path: Path) -> None:
    """A run in which a domain ran out, between two decisions, is stopped before the next decision and after one: the
    mixer goes on from what it has found."""

    def rows_of(cfg: Config, first: int, last: int) -> Any:
        trainer = build(cfg)
        if first:
            trainer.resume()
            assert trainer.step == first
        rows = [trainer.train_step() for _ in range(first, last)]
        trainer.checkpointer.save(last, trainer.engine.state(trainer.progress()))
        trainer.checkpointer.wait()
        return rows, trainer.sampler.history.to_json()

    def cfg_of(name: str) -> Config:
        cfg = mixed(prepared, "doremi", ["train.micro_batch=8"], tmp_path / name)
        cfg.data.sources["letters"].max_epochs = 0.12  # 25 windows
        return cfg

    [(whole, history)] = run_ranks(1, rows_of, cfg_of("whole"), 0, 14)
    [ran_out] = [phase["first_sample"] for phase in history if phase["why"] == "exhausted letters"]
    before = 1 + ran_out // 8  # the first step after it
    assert before % 3 and ran_out > 3 * 8
    rows, first = [], 0
    for last in (before, before + 3, 14):
        [(more, again)] = run_ranks(1, rows_of, cfg_of("cut"), first, last)
        rows, first = rows + more, last
    for key in ("loss", "mixture", "mixer"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in whole], key
    assert again == history


@pytest.mark.parametrize(("stop", "after"), [(5, "none"), (7, "aioli"), (5, "doremi"), (7, "dga")])
def test_a_cap_that_is_raised_gives_a_domain_back_to_a_mixer(
    prepared: Path, tmp_path: Path, stop: int, after: str
) -> None:
    """A domain ran out in step 5; the run is stopped before and after the mixer's next decision, and goes on with
    another cap: the domain has the weight that was decided on. The mixer knows what it knew; another begins from it."""

    def cut(cfg: Config) -> Any:
        trainer = build(cfg)
        rows = [trainer.train_step() for _ in range(stop)]
        trainer.checkpointer.save(stop, trainer.engine.state(trainer.progress()))
        trainer.checkpointer.wait()
        return [row["mixture"] for row in rows if "mixture" in row][-1], trainer.sampler.domain_weights(stop * 8)

    def resumed(cfg: Config) -> Any:
        trainer = build(cfg)
        trainer.resume()
        return trainer.sampler.domain_weights(stop * 8), trainer.mixing.weights, trainer.train_step().get("mixture")

    before = "aioli" if after == "aioli" else "doremi"
    options = {"aioli": {"every": 6, "sweeps": 1, "probe_steps": 1, "eta": 0.5}}.get(before, {})
    words = ["train.micro_batch=8"]
    first = mixed(prepared, before, words, tmp_path / "run", **options)
    first.data.sources["letters"].max_epochs = 0.09  # 19 windows
    [(decided, in_force)] = run_ranks(1, cut, first)
    assert decided["letters"] > 0 and in_force == {"letters": 0.0, "digits": 1.0}
    second = mixed(prepared, after, words, tmp_path / "run", **(options if after == before else {}))
    second.data.sources["letters"].max_epochs = 50
    [(back, known, row)] = run_ranks(1, resumed, second)
    assert back == pytest.approx(decided, abs=1e-6)
    if after == before:
        assert known == decided
    elif after == "dga":
        assert row == pytest.approx(decided, abs=1e-6)


def given(cfg: Config) -> Config:
    """With weights of the user's instead of uniform ones."""
    cfg.data.mixture = "given"
    cfg.data.sources["letters"].weight, cfg.data.sources["digits"].weight = 0.8, 0.2
    return cfg


@pytest.mark.parametrize("change", ["nothing", "mixer", "weights", "caps"])
def test_what_is_changed_on_resume_holds(prepared: Path, tmp_path: Path, change: str) -> None:
    """Another mixer begins anew with what the first has found; a mixer begins anew with weights that the user gives,
    rather than decide from what it had found before; other caps leave it its weights."""

    def cut(cfg: Config) -> None:
        trainer = build(cfg)
        for _ in range(4):
            trainer.train_step()
        trainer.checkpointer.save(4, trainer.engine.state(trainer.progress()))
        trainer.checkpointer.wait()

    def resumed(cfg: Config) -> Any:
        trainer = build(cfg)
        trainer.resume()
        in_force = trainer.sampler.domain_weights(4 * 8)
        return in_force, trainer.mixing.weights is None, trainer.train_step()

    run_ranks(1, cut, mixed(prepared, "doremi", ["train.micro_batch=8"], tmp_path / "run"))
    second = mixed(prepared, "dga" if change == "mixer" else "doremi", ["train.micro_batch=8"], tmp_path / "run")
    if change == "weights":
        given(second)
    if change == "caps":
        second.data.sources["letters"].max_epochs = 50
    [(in_force, anew, row)] = run_ranks(1, resumed, second)
    assert anew == (change in ("mixer", "weights"))
    if change == "weights":
        assert in_force == pytest.approx({"letters": 0.8, "digits": 0.2}, abs=1e-6)
    else:
        assert in_force["digits"] != pytest.approx(0.5, abs=1e-4), "what the first mixer found holds on"
    if anew:
        assert row["mixture"] == pytest.approx(in_force, abs=1e-6)
    else:
        assert "mixture" not in row, "the next decision is due in step 6"
