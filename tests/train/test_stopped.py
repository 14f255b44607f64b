"""From the command line, as a cluster does it: a run is told to stop, or a rank of it is killed, and goes on as if
nothing had happened. A second run is not let into a folder in use."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain import cli, config
from moetrain.checkpoint import Checkpointer
from moetrain.config.check import resolve_sizes
from moetrain.data.prepare import prepare
from moetrain.sweep.plan import exit_reason
from moetrain.train import run
from moetrain.train.exit_codes import REQUEUE
from moetrain.train.lock import locked
from moetrain.train.rundir import claim, keep_config, write_summary
from moetrain.train.trainer import Trainer
from tests.distributed.test_rank_death import rank_of
from tests.distributed.toy_run import BASE, load

ROOT = Path(__file__).resolve().parents[2]
STEPS = 80
WORDS = [*BASE, f"train.steps={STEPS}", "train.micro_batch=2", "checkpoint.every=20", "parallel.ep=2", "launch.ranks=2",
         "device=cpu", "data=own", "data.name=toy", "data.dir=prepared", "data.tokenizer.vocab_size=300",
         "parallel.timeout_s=20"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    prepare(load(folder, []).data)
    return folder


def all_words(folder: Path) -> list[str]:
    return [*WORDS, *(f"data.sources.{name}={{paths:['{folder / name}.txt']}}" for name in ("letters", "digits"))]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return train(folder, *all_words(folder), *words)


def train(folder: Path, *words: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "launch"))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "moetrain.cli", "train", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def lines(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    end = time.monotonic() + 120
    while len(lines(run_dir)) < step:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)


def alone(cfg: config.Config) -> None:
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(exist_ok=True)
    Trainer(cfg, resolve_sizes(cfg.parallel, dist.get_world_size()), run_dir).fit()


def test_a_folder_in_use_is_refused_until_its_run_has_ended_however(tmp_path: Path) -> None:
    """A process that is killed leaves no lock behind."""
    hold = "from moetrain.train.lock import _take, Path; _take(Path('run')); print('held', flush=True); input()"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "launch"))
    pipe, environment = subprocess.PIPE, os.environ | {"PYTHONPATH": path}
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, env=environment, stdin=pipe, stdout=pipe)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"

    def take() -> None:
        with locked(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run/lock").read_text()

    with pytest.raises(RuntimeError, match=rf"in use by another run \(process {holder.pid} on .*\); wait for its end"):
        run_ranks(1, take)
    holder.kill()
    holder.wait()
    run_ranks(1, take)


def test_a_run_that_goes_on_after_its_end_has_not_ended(folder: Path) -> None:
    """It would be shown as finished by a report, the launcher's status and a sweep, and not at all by watch."""
    cfg = load(folder, [f"run_dir={folder / 'longer'}"])

    def claimed_again() -> bool:
        run_dir = claim(cfg, resume=False)
        write_summary(run_dir, {"exit_reason": "finished"})
        claim(cfg, resume=True)
        return exit_reason(run_dir) is None

    assert run_ranks(1, claimed_again) == [True]


def test_a_run_that_was_refused_before_its_first_step_holds_no_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what only ranks find out. The corrected command is given the same folder; a third finds a run there."""
    words = ("run_dir=refused", "launch.ranks=1", "parallel.ep=1", "train.steps=1")
    refused = start(folder, *words, "experts.backend=triton")
    assert refused.communicate()[1].count("the Triton kernels need a GPU") == 1 and refused.returncode == 2
    assert start(folder, *words).wait() == 0
    monkeypatch.chdir(folder)
    assert cli.main(["train", *all_words(folder), *words]) == 2
    assert "refused already holds a run" in capsys.readouterr().err


def test_a_config_that_cannot_be_written_takes_none_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full when a run goes on with another config: without one, the folder would be no run any more."""
    cfg = load(tmp_path, [])
    keep_config(tmp_path, cfg)
    before = (tmp_path / "config.yaml").read_text()
    cfg.train.steps += 1

    def full(cfg: config.Config, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moetrain.train.rundir.save", full)
    with pytest.raises(OSError, match="No space left"):
        keep_config(tmp_path, cfg)
    assert (tmp_path / "config.yaml").read_text() == before


def test_stopped_killed_and_gone_on(folder: Path) -> None:
    """Told to stop by SIGUSR1, it saves and asks for more time by its exit code; the same command goes on. Then a rank
    is killed: the command starts the ranks again by itself. Losses are those of a run that was left alone."""
    process = start(folder, "run_dir=run")
    wait_for_step(process, folder / "run", 5)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == REQUEUE and "stopped by SIGUSR1 after step" in err, err
    stopped = lines(folder / "run")[-1]
    assert [event["event"] for event in stopped["events"]] == ["stopped", "save"]
    assert (folder / "run/checkpoints" / f"step-{stopped['step']}/manifest.json").exists()

    process = start(folder, "run_dir=run")
    wait_for_step(process, folder / "run", min(stopped["step"] + 12, STEPS - 5))
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "starting the ranks again, 1 of 3" in err, err
    rows = lines(folder / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    cfg = config.read(folder / "run/config.yaml")
    cfg.run_dir, cfg.data.dir = str(folder / "alone"), str(folder / "prepared")
    run_ranks(2, alone, cfg, timeout=240)
    assert [row["loss"] for row in rows] == [row["loss"] for row in lines(folder / "alone")]
    # The first "resumed" is gone where no save came after it: the kill takes back what followed the last save.
    assert 1 <= sum(event["event"] == "resumed" for row in rows for event in row.get("events", [])) <= 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_waits_for_a_save_and_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """In the log too, where it is found after the terminal is gone."""
    write = Checkpointer._write
    monkeypatch.setattr(Checkpointer, "_write", lambda *args: (time.sleep(0.2), write(*args)))
    run_dir = folder / f"my run of {ranks}"
    cfg = load(folder, [f"run_dir={run_dir}", "checkpoint.every=1", "train.threads=1"])
    step = Trainer.train_step
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def interrupted(trainer: Trainer) -> dict:
        if trainer.step == 2:
            raise KeyboardInterrupt
        return step(trainer)

    def body() -> None:
        dist.destroy_process_group()  # a run makes its own
        if ranks == 1:
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        run(cfg)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        run_ranks(ranks, body)
    *_, last = (run_dir / "log.txt").read_text().splitlines()
    good = run_dir / "checkpoints/step-2"
    assert f"after step 2; last good checkpoint: {good}; to go on: moetrain train --resume '{run_dir}'" in last


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(folder: Path) -> None:
    """By its checkpoint, which only ranks can tell. Then --resume needs nothing else, as before; also where fewer steps
    are asked for than the run has."""
    words = ("run_dir=short", "launch.ranks=1", "parallel.ep=1", "checkpoint.every=2", "train.steps=4")
    assert start(folder, *words).wait() == 0
    (folder / "short/stopped").touch()
    before = (folder / "short/config.yaml").read_text()
    refused = train(folder, "--resume", "short", "model.n_layers=5")
    _, err = refused.communicate()
    assert refused.returncode == 2 and "is of another model or optimizer" in err, err
    assert (folder / "short/config.yaml").read_text() == before and (folder / "short/stopped").exists()
    assert train(folder, "--resume", "short", "train.steps=2").wait() == 0
    assert json.loads((folder / "short/summary.json").read_text())["exit_reason"] == "finished"
    assert len(list((folder / "short").glob("config-before-resume-*"))) == 1
