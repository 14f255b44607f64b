"""Bad steps. A run with an injected fault is compared with one that never had it, or that never saw the batch; what the
guard calls a spike, with scipy's own median absolute deviation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from moetrain_launch.fork import run_ranks
from scipy.stats import median_abs_deviation

from moetrain import config
from moetrain.checkpoint.layout import steps
from moetrain.config.check import resolve_sizes
from moetrain.config.schema_faults import FaultsConfig
from moetrain.data.loader import Batch
from moetrain.data.prepare import prepare
from moetrain.train.engine import TorchEngine
from moetrain.train.guard import Guard
from moetrain.train.trainer import Trainer
from tests.distributed.toy_run import load

STEPS = 20
SETTINGS = [
    "balance=[aux_loss]",
    f"train.steps={STEPS}",
    "train.micro_batch=4",
    "checkpoint.every=4",
    "faults.retry_after=3",
]

# (step, attempt, samples of this rank) -> what to add to the loss
Fault = Callable[[int, int, list[int]], float]


class Faulty(TorchEngine):
    """Adds something to the loss of chosen steps, on one rank only, so that the others hear of it by the sums."""

    fault: Fault
    attempts: dict[int, int]

    def _backward(self, inputs: Any, scale: Any, step: int) -> Any:
        sums = super()._backward(inputs, scale, step)
        self.attempts[step] = self.attempts.get(step, 0) + 1
        added = self.fault(step, self.attempts[step], self.samples)
        if added and dist.get_rank() == dist.get_world_size() - 1:
            sums[: 1 if math.isfinite(added) else None] += added  # what is not a number is none in auxiliary terms too
            for p in self.model.parameters():
                if p.grad is not None and not math.isfinite(added):
                    torch.Tensor.mul_(p.grad, math.nan)
        return sums

    def train_step(self, batches: list[Batch], *args: Any) -> Any:
        self.samples = [i for batch in batches for i in batch.sample_ids]
        return super().train_step(batches, *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    prepare(load(folder, []).data)
    return folder


def train(cfg: config.Config, fault: Fault, stop_at: int = 0) -> list[dict[str, Any]]:
    """Resume or begin; the lines of metrics. stop_at: a signal comes in this step."""
    trainer = Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), Path(cfg.run_dir))
    faulty: Any = trainer.engine
    faulty.__class__, faulty.fault, faulty.attempts = Faulty, fault, {}
    trainer.guard.told = lambda: 15 * (trainer.step + 1 == stop_at and dist.get_rank() == 0)
    trainer.resume()
    trainer.fit()
    lines = (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]


def run(folder: Path, name: str, fault: Fault, *words: str, stop_at: int = 0, world: int = 2) -> list[dict[str, Any]]:
    cfg = load(folder, [*SETTINGS, f"run_dir={folder / name}", *words])
    return run_ranks(world, train, cfg, fault, stop_at)[0]


def events(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """(event, step) in order, but for saves."""
    found = [event for row in rows for event in row.get("events", [])]
    return [(event["event"], event["step"]) for event in found if event["event"] != "save"]


def curve(rows: list[dict[str, Any]]) -> list[float]:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def straight_rows(folder: Path) -> list[dict[str, Any]]:
    return run(folder, "straight", lambda *_: 0.0)


@pytest.fixture(scope="module")
def straight(straight_rows: list[dict[str, Any]]) -> list[float]:
    return curve(straight_rows)


def test_a_flipped_bit_changes_nothing(folder: Path, straight: list[float]) -> None:
    """What was wrong once is not wrong the next time: bit for bit the run that it never happened to."""
    rows = run(folder, "once", lambda step, attempt, _: math.nan if step == 7 and attempt == 1 else 0.0)
    assert curve(rows) == straight
    assert events(rows) == [("computed_again", 8)]


def test_a_batch_that_stays_bad_is_skipped_tried_again_and_given_up(
    folder: Path, straight_rows: list[dict[str, Any]]
) -> None:
    """Samples 40 to 47 are step 6. Killed by a signal in between, the run ends the same, bit for bit."""

    def bad(step: int, attempt: int, samples: list[int]) -> float:
        return math.nan if set(samples) & set(range(40, 48)) else 0.0

    rows = run(folder, "poison", bad)
    assert events(rows) == [("skipped", 6), ("given_up", 9)]
    [skipped] = [e for row in rows for e in row.get("events", []) if e["event"] == "skipped"]
    assert sorted(skipped["samples"]) == list(range(40, 48)) and skipped["why"] == "loss is nan"
    losses, straight = curve(rows), curve(straight_rows)
    assert losses[:5] == straight[:5] and losses[5] is None and losses[6:] != straight[6:]
    assert rows[8]["lr"] == pytest.approx(0.5 * straight_rows[8]["lr"])
    stopped = run(folder, "poison-stopped", bad, stop_at=7)
    assert [row["step"] for row in stopped] == list(range(1, 8)) and steps(folder / "poison-stopped/checkpoints")[
        0
    ] == 7
    assert curve(run(folder, "poison-stopped", bad)) == losses


def test_a_batch_that_waits_is_given_up_under_another_batch_size(folder: Path) -> None:
    """It makes no whole step of the run as it goes on, whose ranks then would not all have their part."""

    def bad(step: int, attempt: int, samples: list[int]) -> float:
        return math.nan if set(samples) & set(range(40, 48)) else 0.0

    run(folder, "resized", bad, stop_at=7)
    rows = run(folder, "resized", bad, "train.global_batch=16", "train.micro_batch=8")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert events(rows) == [("skipped", 6), ("stopped", 7), ("resumed", 7), ("given_up", 8)]
    [given_up] = [e for row in rows for e in row.get("events", []) if e["event"] == "given_up"]
    assert given_up["of_step"] == 6 and sorted(given_up["samples"]) == list(range(40, 48))


def test_a_spike_is_taken_at_a_lower_rate_the_second_time(folder: Path, straight: list[float]) -> None:
    words = ("faults.window=6", "faults.spike=20")

    def steep(step: int, attempt: int, samples: list[int]) -> float:
        return 1e4 if set(samples) & set(range(80, 88)) else 0.0

    rows = run(folder, "spike", steep, *words)
    assert events(rows) == [("skipped", 11), ("retried_at_lower_lr", 14)]
    assert curve(rows)[:10] == straight[:10]


def test_too_many_in_a_row_stop_the_run(folder: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"loss is nan at step 10 \(samples 72\.\.79\), after 2 bad batches in a row"
    ):
        run(
            folder,
            "lost",
            lambda step, *_: math.nan if step >= 7 else 0.0,
            "faults.stop_after=3",
            "faults.retry_after=9",
        )


def test_what_is_a_spike() -> None:
    """Median and MAD as scipy has them; a level window has a floor of 1% of the median."""

    def judge() -> None:
        guard = Guard(FaultsConfig(window=32, spike=6), skips=True)
        drawn = np.random.default_rng(0).normal(3.0, 0.1, 40)
        for loss in drawn:
            guard._remember(float(loss))
        kept = drawn[-32:]
        limit = np.median(kept) + 6 * median_abs_deviation(kept, scale="normal")
        assert guard.most() == pytest.approx(limit, rel=1e-4)
        assert guard.accept(limit - 0.01, 1.0) and not guard.accept(limit + 0.01, 1.0)
        assert not guard.accept(2.0, math.inf) and not guard.accept(math.nan, 1.0)
        guard.begin(1)  # other weights of the data: nothing is known yet
        assert guard.most() == math.inf
        for _ in range(32):
            guard._remember(2.0)
        assert guard.most() == pytest.approx(2.0 + 6 * 0.02)

    run_ranks(1, judge)
