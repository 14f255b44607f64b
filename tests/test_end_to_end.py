"""A run as a user starts it: two ranks, from the command line.

Promises: two runs with one seed give the same losses bit for bit; a run that is killed at random moments and resumed
gives the same losses as one that was not; a non-finite loss stops the run and names the way back.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain.cli import main

STEPS = 24
SMALL = [
    "experiment=demo",
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.eval_sequences=2",
    "train.eval_every=0",
    "checkpoint.every=3",
    "log.progress=false",
    "log.tensorboard=false",
    "export.at_end=false",
    "generate.prompts=[]",
    "model.dim=32",
    "model.n_layers=2",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moetrain.cli", "train", *arguments]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def curve(run_dir: Path) -> list[tuple[int, float, float, list[float]]]:
    """(step, loss, gradient norm, loads) of every step; fails when a step is missing or there twice."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [(r["step"], r["loss"], r["grad_norm"], r["load_max_over_mean_by_layer"]) for r in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which run ``a`` has gone through without a fault (and the data is prepared)."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder, *SMALL, "run_dir=a")
    return folder


def test_two_runs_with_one_seed_agree_bit_for_bit(straight: Path) -> None:
    run(straight, *SMALL, "run_dir=b")
    assert curve(straight / "b") == curve(straight / "a")
    summaries = [json.loads((straight / name / "summary.json").read_text()) for name in "ab"]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]


def test_killed_at_random_moments_and_resumed(straight: Path) -> None:
    """SIGKILL to every process of the run, three times, each after a random step has been logged."""
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    log = straight / "killed" / "metrics.jsonl"
    arguments = [*SMALL, "run_dir=killed"]
    for kill_at in sorted(draw.sample(range(2, STEPS - 2), 3)):
        process = start(straight, *arguments)
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < kill_at):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in descendants(straight / "killed"):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        arguments = ["--resume", "killed"]
    run(straight, *arguments)
    assert curve(straight / "killed") == curve(straight / "a")
    a, killed = (json.loads((straight / name / "summary.json").read_text()) for name in ("a", "killed"))
    assert killed["val_loss"] == a["val_loss"]


def descendants(run_dir: Path) -> list[int]:
    """Ranks that torchrun put into sessions of their own: found by the run directory in their command line or cwd."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if "moetrain.cli" in (entry / "cmdline").read_text() and (entry / "cwd").resolve() == run_dir.parent:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_non_finite_loss_stops_with_a_way_back(straight: Path) -> None:
    process = start(straight, *SMALL, "run_dir=broken", "optim.lr=1e30", "train.clip_norm=0", "schedule.warmup_steps=0")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    errors = [line for line in output.splitlines() if "moetrain: error:" in line]
    assert len(errors) == 1, output
    assert "at step" in errors[0] and "samples" in errors[0] and "last good checkpoint" in errors[0]
    assert "Traceback" not in output


def test_a_run_directory_is_never_overwritten(
    straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(straight)
    assert main(["train", *SMALL, "run_dir=a"]) != 0
    output = capsys.readouterr().err
    assert "already holds a run" in output and "Traceback" not in output
