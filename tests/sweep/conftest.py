"""A stand-in for training: a second's work in a hundredth, with the files and the signals of a real run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moetrain.sweep import drive, launchers

STAND_IN = """
import json, math, os, signal, sys, time
from pathlib import Path
import yaml
run = Path(sys.argv[-1])
cfg = yaml.safe_load((run / "config.yaml").read_text())
lr, steps, seed = cfg["optim"]["lr"], cfg["train"]["steps"], cfg["seed"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
with open(run.parent / "started", "a") as file:
    file.write(f"{run.name}\\n")
(run / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
if lr > 1:
    sys.exit(1)
if os.environ.get("MEET"):  # each waits for the next one
    began = time.monotonic()
    while len((run.parent / "started").read_text().split()) < 2 and time.monotonic() < began + 30:
        time.sleep(0.01)
if seed == 66 and not (run / "stopped").exists():
    (run / "stopped").touch()
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
with open(run / "metrics.jsonl", "w") as file:
    for step in range(1, steps + 1):
        loss = 3 + (math.log10(lr) + 3) ** 2 + 1 / step
        file.write(json.dumps({"step": step, "loss": loss, "tokens": 8 * step, "val_loss": loss}) + "\\n")
        file.flush()
        if seed == 77 and step == steps // 2:
            time.sleep(60)
(run / "summary.json").write_text(json.dumps({"exit_reason": "finished"}))
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs of sweeps are those of the stand-in, in an empty folder."""
    file = tmp_path / "program" / "stand_in.py"
    file.parent.mkdir()
    file.write_text(STAND_IN)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(launchers, "PROGRAM", (str(file),))
    monkeypatch.setattr(drive, "POLL_S", 0.02)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    path = os.pathsep.join(filter(None, sys.path))
    monkeypatch.setenv("PYTHONPATH", path)
    yield


@pytest.fixture
def started() -> Callable[[str], list[str]]:
    """Names of the runs of a sweep in the order in which they started."""
    return lambda folder: Path(folder, "started").read_text().split()
