"""Where a step's time goes: by a clock of our own, and in the traces of a run, which must not change by it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.train.spans import Spans
from tests.train.test_training import build, folder, load

__all__ = ["folder"]


def test_a_span_has_the_time_that_the_spans_inside_it_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 10 s: 1 s, a backward of 6 s with 2 s of optimizer in its middle, 3 s."""
    clock = [0.0]
    monkeypatch.setattr(Spans, "_now", lambda self: clock[0])
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)

    def spend(seconds: float) -> None:
        clock[0] += seconds

    class Engine:
        model = SimpleNamespace(modules=list, forward=lambda: None)
        optimizer = SimpleNamespace(step=lambda: spend(2))

        def _backward(self) -> None:
            spend(3)
            self.optimizer.step()
            spend(1)

        def train_step(self) -> None:
            spend(1)
            self._backward()
            spend(3)

    engine = Engine()
    spans = Spans(config.load(["log.every=2"]), engine, torch.device("cpu"), tmp_path)
    with spans.step(1):
        engine.train_step()
    assert spans.read(10.0, 0.0) == {}  # not a logged step
    with spans.step(2):
        engine.train_step()
    assert spans.read(12.5, 2.5)["time_split"] == pytest.approx(
        {"waiting": 0.32, "backward": 0.32, "optimizer": 0.16, "data": 0.2}
    )


def test_a_traced_run_is_the_same_run(folder: Path) -> None:
    """Losses are equal bit for bit; the trace names every part of both layers; shares add up to the whole step."""

    def work(cfg: config.Config) -> list[dict[str, Any]]:
        trainer = build(cfg)
        trainer.fit()
        return [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]

    short = ["train.steps=3", "checkpoint.at_end=false", "log.progress=false", "log.tensorboard=false"]
    traced = load(folder, *short, f"run_dir={folder / 'traced'}", "train.profile.steps=[2]", "train.recompute=full")
    plain = load(folder, *short, f"run_dir={folder / 'plain'}", "train.profile.time_split=false")
    rows, others = run_ranks(1, work, traced)[0], run_ranks(1, work, plain)[0]
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    assert "time_split" not in others[0]
    for row in rows:
        parts = row["time_split"]
        assert set(parts) >= {"attention", "router", "dispatch", "experts", "combine", "backward", "optimizer", "data"}
        assert min(parts.values()) >= 0 and sum(parts.values()) <= 1 + 1e-9
    with gzip.open(folder / "traced" / "profile" / "step-2-rank-0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    for part in ("attention", "router", "dispatch", "experts", "combine"):
        assert {f"layer 0 {part}", f"layer 1 {part}"} <= names
    assert not (folder / "plain" / "profile").exists()
