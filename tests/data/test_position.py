"""A run that is stopped and taken up again reads what it would have read: in epoch 2, after changes of the weights,
under any number of ranks, and more than once. The reference is the run that is never stopped."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from moetrain.config.errors import DataError
from moetrain.config.schema import Config, TrainConfig
from moetrain.config.schema_data import DataConfig, DomainConfig, MixtureStepConfig, SourceConfig
from moetrain.data.dataset import TokenData
from moetrain.data.deal import Dealer, Source
from moetrain.data.history import Phase, WeightHistory
from moetrain.data.loader import Loader
from moetrain.data.position import position, restore
from moetrain.data.sampler import Sample
from moetrain.train.preflight import asked_of, open_sampler

STEPS, BATCH, S = 60, 24, 64
RANKS = [(1, 24), (1, 8), (2, 4), (2, 12), (3, 8), (4, 2), (6, 4), (8, 3), (12, 1), (24, 1)]  # dp_size, micro_batch
Step = list[Sample]


def config(sea: float = 0.5, exhausted: str = "reweight", cap: float | None = 3.4, **train: Any) -> Config:
    """Three sources, two in one domain; sea is soon in its second epoch and runs out after the schedule has changed
    twice."""
    sources = {
        "sea": SourceConfig(weight=sea, max_epochs=cap),
        "code": SourceConfig(domain="land", weight=1),
        "food": SourceConfig(domain="land", weight=2),
    }
    schedule = [
        MixtureStepConfig(weights={"land": 0.6}, from_step=20),
        MixtureStepConfig(weights={"food": 0.4}, from_tokens=30 * BATCH * S + 100),
    ]
    return Config(
        data=DataConfig(sources=sources, domains={"land": DomainConfig()}, schedule=schedule, exhausted=exhausted),  # type: ignore[arg-type]
        train=TrainConfig(**{"steps": STEPS, "global_batch": BATCH, "micro_batch": 1, "seq_len": S} | train),
        seed=7,
    )


@pytest.fixture(scope="module")
def data(data: TokenData) -> TokenData:
    land = {"code": "land", "food": "land"}
    return TokenData(data.dir, data.manifest, data._shards, data.vocab_size, land)


def take(
    cfg: Config, data: TokenData, saved: dict[str, Any] | None, start: int, stop: int, ranks: tuple[int, int]
) -> tuple[list[Step], dict[str, Any], list[str]]:
    """Steps ``start`` to ``stop`` as all ranks read them, in the order of micro-batches and ranks; what a checkpoint
    then keeps, through JSON; and what was said at the resume."""
    dp, micro = ranks
    sampler, asked = open_sampler(cfg, data)
    loaders = [Loader(data, sampler, cfg.train.global_batch, micro, rank, dp, prefetch=0) for rank in range(dp)]
    said: list[str] = []
    if saved is not None:
        asked = asked_of(cfg, data, start, saved["samples"])
        for loader in loaders:
            loader.begin(start, saved["samples"])
        said = restore(sampler, asked, saved)
    steps = []
    for step in range(start, stop):
        parts = [loader.step(step) for loader in loaders]
        ids = [i for m in range(len(parts[0])) for part in parts for i in part[m].sample_ids]
        steps.append([sampler.locate(i) for i in ids])
    kept = position(sampler, asked, loaders[0].first_sample(stop))
    return steps, json.loads(json.dumps(kept)), said


@pytest.fixture(scope="module")
def undisturbed(data: TokenData) -> list[Step]:
    return take(config(), data, None, 0, STEPS, (1, BATCH))[0]


def test_the_run_has_what_the_others_must_meet(data: TokenData, undisturbed: list[Step]) -> None:
    """A second epoch, two steps of a schedule, and a source that runs out; no window twice in an epoch."""
    _, kept, _ = take(config(), data, None, 0, STEPS, (1, BATCH))
    assert [phase["why"] for phase in kept["history"]] == ["config", "schedule", "schedule", "exhausted sea"]
    epochs = [max(sample.epoch for sample in step if sample.source == "sea") for step in undisturbed[:20]]
    assert epochs[0] == 0 and epochs[18] >= 1 and 31 * BATCH < kept["history"][-1]["first_sample"] < 50 * BATCH
    seen = Counter((x.source, x.epoch, x.window) for step in undisturbed for x in step)
    assert max(seen.values()) == 1
    for name, source in kept["sources"].items():
        assert source["samples"] == sum(x.source == name for step in undisturbed for x in step)


@pytest.mark.parametrize("seed", range(6))
def test_stopped_anywhere_and_resumed_on_other_ranks(data: TokenData, undisturbed: list[Step], seed: int) -> None:
    """Three stops at random steps, so the second and third resumes begin from a resumed run's checkpoint."""
    rng = random.Random(seed)
    stops = sorted(rng.sample(range(1, STEPS), 3))
    journey = [rng.choice(RANKS) for _ in range(4)]
    print(f"seed {seed}: stops {stops}, ranks {journey}")
    saved: dict[str, Any] | None = None
    for start, stop, ranks in zip([0, *stops], [*stops, STEPS], journey, strict=True):
        steps, saved, said = take(config(), data, saved, start, stop, ranks)
        assert said == []
        # As sets: the deal to micro-batches follows their number
        assert [set(step) for step in steps] == [set(step) for step in undisturbed[start:stop]]
        if ranks[0] * ranks[1] == BATCH:
            assert steps == undisturbed[start:stop]


@pytest.mark.parametrize("stop", [5, 20, 25, 50])
def test_weights_changed_on_resume_hold_from_there_on_and_change_nothing_before(
    data: TokenData, undisturbed: list[Step], stop: int
) -> None:
    """Before the schedule, as it begins, after it, and after sea has run out. Later schedule steps still come."""
    before, saved, _ = take(config(), data, None, 0, stop, (1, BATCH))
    assert before == undisturbed[:stop]
    after, kept, said = take(config(sea=0.8), data, saved, stop, STEPS, (1, BATCH))
    history = kept["history"]
    user = next(phase for phase in history if phase["why"] == "user")
    assert [p for p in history if p["first_sample"] < stop * BATCH] == [
        p for p in saved["history"] if p["first_sample"] < stop * BATCH
    ]
    seen = Counter((x.source, x.epoch, x.window) for step in [*before, *after] for x in step)
    assert max(seen.values()) == 1  # nothing is repeated, and every epoch goes on where it was
    expected = 0.8 if stop < 50 else 0.0  # sea has run out by then, and there is none to give
    assert user["first_sample"] == stop * BATCH and user["weights"]["sea"] == pytest.approx(expected)
    assert f"from sample {stop * BATCH:,} on" in said[0]
    share = sum(x.source == "sea" for step in after[:5] for x in step) / (5 * BATCH)
    assert share == pytest.approx(expected, abs=0.03)
    later = [phase["first_sample"] for phase in history if phase["why"] == "schedule"]
    assert later == [n for n in (20 * BATCH, 30 * BATCH + 2) if n != stop * BATCH]
    # a further resume without a change keeps it, also before there was a checkpoint
    middle, again, _ = take(config(sea=0.8), data, saved, stop, stop + 3, (2, 12))
    rest, last, said = take(config(sea=0.8), data, again, stop + 3, STEPS, (1, BATCH))
    assert said == [] and last["history"] == history
    assert [set(step) for step in [*middle, *rest]] == [set(step) for step in after]


def test_decisions_of_a_mixer_are_kept(data: TokenData) -> None:
    """Also one that was made after the last step before the checkpoint, and has dealt nothing yet."""

    def weights(step: int) -> dict[str, float]:
        return {"sea": 1.0 + step % 3, "code": 1.0, "food": 1.0}

    cfg = config(cap=None)
    cfg.data.schedule = []

    def run(saved: dict[str, Any] | None, start: int, stop: int) -> tuple[list[Step], dict[str, Any]]:
        sampler, asked = open_sampler(cfg, data)
        loader = Loader(data, sampler, BATCH, BATCH, prefetch=2)
        if saved is not None:
            asked = asked_of(cfg, data, start, saved["samples"])
            loader.begin(start, saved["samples"])
            assert restore(sampler, asked, saved) == []
        steps = []
        for step in range(start, stop):
            steps.append([sampler.locate(i) for i in loader.step(step)[0].sample_ids])
            if (step + 1) % 4 == 0:
                loader.change(weights(step), "mixer test")
        loader.close()
        return steps, position(sampler, asked, loader.first_sample(stop))

    whole, kept = run(None, 0, 20)
    assert [phase["first_sample"] for phase in kept["history"]] == [0, *range(4 * BATCH, 21 * BATCH, 4 * BATCH)]
    for stop in (7, 8, 9):
        first, saved = run(None, 0, stop)
        second, again = run(saved, stop, 20)
        assert first + second == whole and again["history"] == kept["history"]


def test_steps_made_ahead_are_made_again_when_weights_change(data: TokenData) -> None:
    sampler, _ = open_sampler(config(cap=None), data)
    plain, _ = open_sampler(config(cap=None), data)
    ahead, behind = Loader(data, sampler, BATCH, BATCH, prefetch=3), Loader(data, plain, BATCH, BATCH, prefetch=0)
    for step in range(8):
        a, b = ahead.step(step)[0], behind.step(step)[0]
        assert a.sample_ids == b.sample_ids and (a.tokens_BS == b.tokens_BS).all()
        if step in (2, 3, 6):
            new = {"sea": float(step), "code": 1.0, "food": 0.0}
            ahead.change(new, "user")
            behind.change(new, "user")
    ahead.close()


def test_another_batch_size_goes_on_after_the_last_sample(data: TokenData, undisturbed: list[Step]) -> None:
    _, saved, _ = take(config(), data, None, 0, 10, (1, BATCH))
    steps, kept, _ = take(config(global_batch=8), data, saved, 10, 40, (1, 8))
    assert sorted(x.index for step in steps for x in step) == list(range(240, 480))
    flat: Mapping[int, Sample] = {x.index: x for step in undisturbed for x in step}
    assert all(
        x == flat[x.index] for step in steps for x in step if x.index < 320
    )  # schedule: step 20 is sample 320 now
    assert kept["samples"] == 480


def test_stop_ends_the_run_at_the_first_sample_that_is_not_there(data: TokenData, undisturbed: list[Step]) -> None:
    sampler, _ = open_sampler(config(exhausted="stop"), data)
    loader = Loader(data, sampler, BATCH, BATCH, prefetch=0)
    out = next(phase.first_sample for phase in open_sampler(config(), data)[0].history if "exhausted" in phase.why)
    assert sampler.end == out
    last = loader.step_of(out)
    steps = [[sampler.locate(i) for i in loader.step(step)[0].sample_ids] for step in range(last)]
    assert steps == undisturbed[:last]
    with pytest.raises(DataError, match=f"past the end of the data, which is at sample {out}"):
        loader.step(last)


def test_a_cap_that_is_raised_on_resume_gives_more(data: TokenData) -> None:
    _, saved, _ = take(config(), data, None, 0, 50, (1, BATCH))
    steps, kept, said = take(config(cap=9.0), data, saved, 50, STEPS, (1, BATCH))
    assert "sea 0 -> 0." in said[0] and kept["history"][-1]["why"] == "user"
    assert any(x.source == "sea" for x in steps[0])
    _, kept, _ = take(config(cap=0.5), data, take(config(), data, None, 0, 10, (1, BATCH))[1], 10, STEPS, (1, BATCH))
    assert kept["history"][1]["first_sample"] == 10 * BATCH and kept["history"][1]["weights"]["sea"] == 0


def test_what_would_repeat_or_skip_text_is_refused(data: TokenData) -> None:
    _, saved, _ = take(config(), data, None, 0, 5, (1, BATCH))
    other_seed, other_length = config(), config(seq_len=32)
    other_seed.seed = 8
    changed = {**saved, "sources": {**saved["sources"], "sea": {**saved["sources"]["sea"], "sha256": "0"}}}
    gone = {**saved, "sources": {**saved["sources"], "air": saved["sources"]["sea"]}}
    for cfg, kept, message in [
        (other_seed, saved, "seed=8, but this run began with seed 7"),
        (other_length, saved, "seq_len=32, but this run began with 64"),
        (config(), changed, "source 'sea' is not the text that this run began with"),
        (config(), gone, "source 'air' of this run is not in the data any more"),
    ]:
        with pytest.raises(DataError, match=message):
            take(cfg, data, kept, 5, 6, (1, BATCH))
    for domain, grouped in (("food", {"code": "land"}), ("land", {"code": "land", "food": "land", "sea": "land"})):
        other = TokenData(data.dir, data.manifest, data._shards, data.vocab_size, grouped)
        with pytest.raises(DataError, match=f"shares its domain '{domain}' with others than when this run"):
            restore(open_sampler(config(), other)[0], asked_of(config(), data, 5, 5 * BATCH), saved)


@pytest.mark.parametrize("seed", range(8))
def test_the_order_in_which_weights_are_named_decides_no_sample(seed: int) -> None:
    """A schedule names sources domain by domain, a checkpoint in the order of the config, and the last bit of a sum
    follows its order; among equal shares it decides which source gets a sample."""
    rng = random.Random(seed)
    names = list("abcdef")
    sources = {name: Source(rng.choice("xyz"), 64.0) for name in names}
    mixed = rng.sample(names, len(names))
    shares = [{name: rng.choice([0.1, 0.2, 0.3, 0.7]) for name in mixed} for _ in range(4)]
    phases = [Phase(20 * n, {x: w / sum(of.values()) for x, w in of.items()}, "config") for n, of in enumerate(shares)]
    dealer, resumed = Dealer(sources, phases), Dealer(sources, phases)
    named = [replace(phase, weights={name: phase.weights[name] for name in names}) for phase in phases]
    resumed.restore(WeightHistory(named), 80, [])
    assert [resumed.locate(i) for i in range(300)] == [dealer.locate(i) for i in range(300)]


def test_a_new_source_may_join_on_resume(data: TokenData, undisturbed: list[Step]) -> None:
    """The run begins without food and takes it in: what it had read stays as it was."""
    kept_sources = {name: info for name, info in data.manifest.domains.items() if name != "food"}
    fewer = TokenData(data.dir, replace(data.manifest, domains=kept_sources), data._shards, data.vocab_size)
    cfg = config(cap=None)
    cfg.data.schedule = []
    small = Config(data=DataConfig(sources={n: cfg.data.sources[n] for n in kept_sources}), train=cfg.train, seed=7)
    small.data.sources["code"] = SourceConfig(weight=0.5)
    before, saved, _ = take(small, fewer, None, 0, 10, (1, BATCH))
    after, _, said = take(cfg, data, saved, 10, 20, (1, BATCH))
    assert {x.source for step in after for x in step} == {"sea", "code", "food"} and "food 0 -> 0.3333" in said[0]
    assert max(Counter((x.source, x.epoch, x.window) for step in [*before, *after] for x in step).values()) == 1
