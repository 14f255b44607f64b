"""Figures of a log step against closed forms, and sinks against what their own readers read back."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moetrain import config
from moetrain.moe.balance import Loads
from moetrain.train.metrics import load_metrics
from moetrain.train.sinks import Jsonl, LoadLog, TensorBoard, Writer


def test_load_metrics_of_known_loads() -> None:
    """A balanced layer, and one where half of the experts share the load and a tenth was dropped."""
    loads = Loads(
        counts={"layers.0.moe": torch.full((8,), 10), "layers.1.moe": torch.tensor([20, 20, 20, 20, 0, 0, 0, 0])},
        dropped={"layers.0.moe": 0, "layers.1.moe": 8},
    )
    metrics = load_metrics(loads)
    assert metrics["load_max_over_mean_by_layer"] == pytest.approx([1.0, 2.0])
    assert metrics["load_entropy_by_layer"] == pytest.approx([1.0, math.log(4) / math.log(8)])
    assert metrics["dead_experts_by_layer"] == [0, 4] and metrics["dead_experts"] == 4
    assert metrics["dropped_share_by_layer"] == pytest.approx([0.0, 0.1])
    assert metrics["load_max_over_mean"] == pytest.approx(2.0)


@pytest.mark.parametrize("block", [48, 2**24])
@pytest.mark.parametrize("damage", [b"", b'{"step\0\0\xff: 3}\n'])
def test_jsonl_keeps_each_step_once_over_a_kill(
    damage: bytes, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed in the middle of a line, after the checkpoint of step 2, perhaps on a machine that crashed before:
    its disk has zeros, or anything, in place of the end of one line and the beginning of another. Of the file little is
    read at a time."""
    monkeypatch.setattr(Jsonl, "BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n{"step": 3}\n{"ste')
    sink = Jsonl(path, resumed_step=2)
    sink.write(3, {"step": 3, "again": True})
    sink.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_jsonl_that_goes_on_reads_the_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of the beginning that is no JSON would be cut off, were it read."""
    monkeypatch.setattr(Jsonl, "BLOCK", 60)
    path = tmp_path / "metrics.jsonl"
    rows = [f'{{"step": {step}}}\n' for step in range(1, 10)]
    path.write_text("".join(["far away\n", *rows]))
    Jsonl(path, resumed_step=7).close()
    assert path.read_text() == "".join(["far away\n", *rows[:7]])


def test_jsonl_of_a_run_whose_checkpoints_are_gone_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    for n in (1, 2):
        sink = Jsonl(tmp_path / "metrics.jsonl", resumed_step=0)
        sink.write(1, {"step": 1, "start": n})
        sink.close()
    files = {file.name: json.loads(file.read_text())["start"] for file in tmp_path.iterdir()}
    assert files == {"metrics-before-1.jsonl": 1, "metrics.jsonl": 2}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_jsonl_waits_for_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writes to /dev/full fail with ENOSPC; once there is room, all lines are there in order, after one warning."""
    path = tmp_path / "metrics.jsonl"
    sink = Jsonl(path, resumed_step=0)
    sink.write(1, {"step": 1})
    good, sink._file = sink._file, Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with caplog.at_level("WARNING", logger="moetrain"):
        sink.write(2, {"step": 2})
        sink.write(3, {"step": 3})
    sink._file = good
    sink.write(4, {"step": 4})
    sink.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_tensorboard_reads_what_was_written_before_a_kill(tmp_path: Path) -> None:
    """One number, one a domain, one a layer; and events, of which scalars say how many."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path, resumed_step=0)
    told = [{"event": "skipped", "step": 1, "samples": [8, 9]}, {"event": "save", "step": 1}]
    by_layer = {"dead_experts_by_layer": [0, 1]}
    sink.write(1, {"loss": 2.5, "val_loss_by_domain": {"code": 3.5}, **by_layer, "events": told})
    end = time.monotonic() + 60
    while not (events := EventAccumulator(str(tmp_path / "tensorboard")).Reload()).Tags()["scalars"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    values = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert values == {
        "loss": 2.5,
        "val_loss_by_domain/code": 3.5,
        "dead_experts_by_layer/0": 0.0,
        "dead_experts_by_layer/1": 1.0,
        "events/skipped": 1.0,
        "events/save": 1.0,
    }
    sink.close()


@pytest.mark.parametrize("key", ["", "a-key"], ids=["offline", "online"])
def test_wandb_is_one_run_over_a_resume_where_it_is_online(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline each start has its own: two parts with one id take each other's place when they are sent."""
    asked: list[dict[str, Any]] = []

    def init(**given: Any) -> Any:
        asked.append(given)
        return SimpleNamespace(id=given["id"] or f"run{len(asked)}", step=0, log=lambda *a, **k: None, finish=lambda: 0)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    cfg = config.load(["log.wandb=auto", "log.progress=false", "log.tensorboard=false"])
    for step in (1, 2):
        writer = Writer(cfg, tmp_path, config.to_dict(cfg), resumed_step=step - 1, rank=0)
        writer.write(step, {"step": step, "loss": 1.0})
        writer.close()
    assert [(a["mode"], a["id"], a["resume"]) for a in asked] == (
        [("online", None, None), ("online", "run1", "allow")] if key else [("offline", None, None)] * 2
    )


def test_wandb_leaves_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = config.load(["log.wandb=auto", "log.progress=false", "log.tensorboard=false"])
    writer = Writer(cfg, tmp_path, config.to_dict(cfg), resumed_step=0, rank=0)
    writer.write(1, {"step": 1, "loss": 1.0})
    writer.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_a_dead_tracker_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Dead:
        def write(self, step: int, metrics: dict) -> None:
            raise ConnectionError("no route")

        def close(self) -> None: ...

    class DeadAtTheEnd(Dead):
        def write(self, step: int, metrics: dict) -> None: ...

        def close(self) -> None:
            raise TimeoutError("no answer")

    cfg = config.load(["log.progress=false", "log.tensorboard=false"])
    writer = Writer(cfg, tmp_path, {}, resumed_step=0, rank=0)
    writer._sinks[:0] = [Dead(), DeadAtTheEnd()]
    with caplog.at_level("WARNING", logger="moetrain"):
        writer.write(1, {"step": 1})
        writer.write(2, {"step": 2})
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert [record.message for record in caplog.records] == [
        "Dead stopped: no route; training goes on without it",
        "DeadAtTheEnd did not close: no answer",
    ]


def test_loads_are_summed_over_stretches_and_cut_at_a_resume(tmp_path: Path) -> None:
    """A run of 800 steps has lines of 2 steps. Killed after step 7, it goes on from step 5: the line of step 6, which
    will be made again, goes, and what was counted of step 5 with it."""
    path = tmp_path / "loads.jsonl"
    load = lambda n: Loads({"layers.1.moe": torch.tensor([n, 1])}, {"layers.1.moe": 0})  # noqa: E731
    log = LoadLog(path, resumed_step=0, steps=800)
    for step in range(1, 8):
        log.count(step, load(step))
    again = LoadLog(path, resumed_step=5, steps=800)
    for step in (6, 7):
        again.count(step, load(step))
    again.close()
    rows = [(row["step"], row["counts"]["layers.1.moe"]) for row in map(json.loads, path.read_text().splitlines())]
    assert rows == [(2, [3, 2]), (4, [7, 2]), (6, [6, 1]), (7, [7, 1])]


def test_drops_by_position_are_shares_of_each_eighth() -> None:
    """160 choices, 20 an eighth: 5 dropped of the first, 10 of the last."""
    parts = torch.tensor([5, 0, 0, 0, 0, 0, 0, 10])
    loads = Loads({"layers.0.moe": torch.full((8,), 20)}, {"layers.0.moe": 15}, {"layers.0.moe": parts})
    assert load_metrics(loads)["dropped_by_position"] == pytest.approx([0.25, 0, 0, 0, 0, 0, 0, 0.5])
