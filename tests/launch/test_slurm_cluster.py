"""Runs on a real Slurm: two nodes on this machine, started for these tests by ``scripts/slurm_cluster.sh``.

Promise: a job that is preempted, and told by a signal that its time is nearly up, ends as if nothing had happened,
bit for bit. Small stand-ins for the training command show when a job is put back into the queue and when it is not.
Skipped where Slurm is not installed; ``make slurm-test`` installs it. Nothing here depends on how long things take.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from moetrain_launch import slurm
from moetrain_launch.job import Job, LaunchError, notes
from moetrain_launch.settings import LaunchConfig, SlurmConfig

from moetrain import cli

ROOT = Path(__file__).resolve().parents[2]
ABSENT = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(ABSENT) or os.getuid() != 0, reason=f"needs root and Slurm ({', '.join(ABSENT) or 'there'}): make slurm-test"
)

STEPS = 300
SMALL = [
    "experiment=demo",
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.eval_sequences=2",
    "train.eval_every=0",
    "train.threads=1",
    "checkpoint.every=20",
    "log.progress=false",
    "log.tensorboard=false",
    "export.at_end=false",
    "generate.prompts=[]",
    "model.dim=32",
    "model.n_layers=2",
    "launch=slurm",
    "launch.nodes=2",
    "launch.ranks=1",
    "launch.slurm.time=60",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to run in, with a cluster that its environment leads to."""
    folder = tmp_path_factory.mktemp("slurm")
    script = str(ROOT / "scripts" / "slurm_cluster.sh")
    before = os.environ.copy()
    try:
        subprocess.run([script, "up", str(folder / "cluster")], check=True, timeout=120)
        os.environ["SLURM_CONF"] = str(folder / "cluster" / "slurm.conf")
        os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "launch"))
        os.environ["OMP_NUM_THREADS"] = "1"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        yield folder
    finally:
        subprocess.run([script, "down", str(folder / "cluster")], timeout=120)
        os.environ.clear()
        os.environ.update(before)


def moetrain(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "moetrain.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(what: Callable[[], object], run_dir: Path, seconds: float = 400) -> None:
    """Wait for ``what``; the job's log is the message when it does not come."""
    end = time.monotonic() + seconds
    while not what():
        log = run_dir / "slurm.log"
        assert time.monotonic() < end, log.read_text() if log.exists() else "the job has not begun"
        time.sleep(0.2)


def lines(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def of_job(run_dir: Path, name: str) -> str:
    return slurm.fields(notes(run_dir)[0].id).get(name, "")


def ended(run_dir: Path) -> bool:
    return of_job(run_dir, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_a_preempted_and_signalled_job_ends_as_if_nothing_had_happened(cluster: Path) -> None:
    a, b = cluster / "runs/a", cluster / "runs/b"
    moetrain(cluster, "launch", *SMALL, f"run_dir={a}")
    until(lambda: ended(a), a)
    assert of_job(a, "JobState") == "COMPLETED", (a / "slurm.log").read_text()
    assert "start 0 of job" in (a / "slurm.log").read_text() and "on n[1-2]" in (a / "slurm.log").read_text()

    moetrain(cluster, "launch", *SMALL, f"run_dir={b}", "launch.slurm.partition=main")
    until(lambda: list((b / "checkpoints").glob("step-*0")), b)
    # another job that needs both nodes, from a partition that comes first
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, cwd=cluster, check=True, stdout=subprocess.DEVNULL)
    until(lambda: of_job(b, "Restarts") == "1" and of_job(b, "JobState") == "RUNNING", b)
    before = lines(b)
    assert 20 <= before < STEPS
    until(lambda: lines(b) not in (before, STEPS) and "resumed from" in (b / "slurm.log").read_text(), b)
    # what Slurm sends before the time limit, without the wait for it
    subprocess.run(["scancel", "--signal=USR1", notes(b)[0].id], check=True)
    until(lambda: of_job(b, "Restarts") == "2" or ended(b), b)
    until(lambda: ended(b), b)
    assert of_job(b, "JobState") == "COMPLETED" and of_job(b, "Restarts") == "2", (b / "slurm.log").read_text()

    assert losses(b) == losses(a) and [step for step, _, _ in losses(b)] == list(range(1, STEPS + 1))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]
    assert not list(b.glob("config-before-resume-*"))
    told = moetrain(cluster, "launch", "status", str(b))
    assert "COMPLETED" in told and "restarted 2 times" in told and f"step {STEPS}, loss" in told and "finished" in told
    assert "done" in moetrain(cluster, "launch", "logs", str(b), "--lines", "50")


RANK = """
import os, signal, sys, time
run = sys.argv[-1]
starts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
with open(f"{run}/ranks.txt", "a") as file:
    file.write(" ".join(os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "WHO")) + "\\n")
what = sys.argv[1]
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    time.sleep(300)
sys.exit({"config": 2, "saved": 0 if starts == 2 else 85, "fails": 1}[what])
"""


def submit(folder: Path, what: str, restarts: int = 0) -> Path:
    """A job whose ranks only note who they are, and end as ``what`` says."""
    run_dir = folder / "stand-ins" / what
    run_dir.mkdir(parents=True)
    (folder / "stand_in.py").write_text(RANK)
    settings = LaunchConfig(kind="slurm", nodes=2, ranks=2, restarts=restarts, slurm=SlurmConfig(time=10))
    settings.env = {"PYTHONPATH": str(folder), "WHO": "a b"}
    slurm.submit(Job(run_dir, ("stand_in", what, str(run_dir)), settings))
    return run_dir


@pytest.mark.parametrize(
    ("what", "restarts", "starts"), [("config", 3, 1), ("saved", 0, 3), ("fails", 1, 2)], ids=lambda value: str(value)
)
def test_the_exit_code_says_whether_a_job_goes_back_to_the_queue(
    cluster: Path, what: str, restarts: int, starts: int
) -> None:
    """A config that cannot run is not tried again, ranks that have saved always, ranks that failed a few times."""
    run_dir = submit(cluster, what, restarts)
    until(lambda: ended(run_dir), run_dir)
    assert of_job(run_dir, "JobState") == ("COMPLETED" if what == "saved" else "FAILED")
    log = (run_dir / "slurm.log").read_text()
    assert [line[:7] for line in log.splitlines() if line.startswith("start ")] == [f"start {n}" for n in range(starts)]
    ranks = sorted(set((run_dir / "ranks.txt").read_text().splitlines()))
    assert ranks == ["0 0 4 2 a b", "1 1 4 2 a b", "2 0 4 2 a b", "3 1 4 2 a b"]


@pytest.mark.parametrize("by", ["moetrain", "scancel"])
def test_a_cancelled_job_stays_cancelled(cluster: Path, by: str) -> None:
    """Although its ranks leave with the code that asks to be put back."""
    run_dir = submit(cluster, "wait")
    note = notes(run_dir)[0]
    until(
        lambda: (run_dir / "ranks.txt").exists() and len((run_dir / "ranks.txt").read_text().splitlines()) == 4, run_dir
    )
    if by == "moetrain":
        assert slurm.cancel(note) == f"job {note.id} was cancelled"
    else:
        subprocess.run(["scancel", note.id], check=True)
    until(lambda: ended(run_dir), run_dir)
    time.sleep(2)  # time for the batch file to do wrong
    assert of_job(run_dir, "JobState") == "CANCELLED" and "back to the queue" not in (run_dir / "slurm.log").read_text()
    assert slurm.cancel(note) == f"job {note.id} has ended already"
    shutil.rmtree(run_dir)


def test_a_partition_that_does_not_exist_is_named_with_those_that_do(cluster: Path) -> None:
    command = [sys.executable, "-m", "moetrain.cli", "launch", *SMALL, "launch.slurm.partition=gpus", "run_dir=runs/p"]
    done = subprocess.run(command, cwd=cluster, capture_output=True, text=True)
    assert done.returncode == 2 and not (cluster / "runs/p/launch.json").exists()
    says = "launch.slurm.partition=gpus: the cluster has no such partition; it has main, urgent"
    assert done.stderr == f"moetrain: error: {says}\n"
    with pytest.raises(LaunchError, match=r"sbatch refused: .*[Mm]emory|configuration"):
        run_dir = cluster / "stand-ins" / "greedy"
        run_dir.mkdir(parents=True)
        slurm.submit(Job(run_dir, ("stand_in",), LaunchConfig(kind="slurm", slurm=SlurmConfig(mem="900G"))))


def test_a_sweep_is_an_array_through_submitit(cluster: Path) -> None:
    """Three stand-ins; one is told that its time is nearly up, saves, and is run again from the queue."""
    array = pytest.importorskip("moetrain_launch.array")
    pytest.importorskip("submitit")
    folder = cluster / "sweep"
    (cluster / "swept.py").write_text(SWEPT)
    settings = LaunchConfig(
        kind="slurm", env={"PYTHONPATH": os.pathsep.join([str(cluster), *filter(None, sys.path)])}, at_once=2
    )
    settings.slurm.time = 10
    jobs = []
    for name in ("000", "001", "002"):
        (folder / name).mkdir(parents=True)
        jobs.append(Job(folder / name, ("swept", str(folder / name)), settings))
    number = array.submit(folder, jobs)
    [note] = notes(folder)
    until(lambda: (folder / "001" / "waits").exists(), folder)
    subprocess.run(["scancel", "--signal=USR2", f"{number}_1"], check=True)  # submitit's signal for the time limit
    until(lambda: array.state(note) == f"array {number}: 3 COMPLETED", folder)
    assert [(folder / name / "done").read_text() for name in ("000", "001", "002")] == ["0", "1", "0"]
    assert (folder / "001" / "saved").exists()


def test_a_sweep_outlives_the_process_that_started_it(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without accounts. The sweep is stopped, goes on, and finds its three jobs. One of them is put back into the queue
    and starts again, which is no failure; one is cancelled, which is."""
    launchers = pytest.importorskip("moetrain.sweep.launchers")
    for package in ("submitit", "joblib"):
        pytest.importorskip(package)
    (cluster / "driven.py").write_text(DRIVEN)
    monkeypatch.chdir(cluster)
    monkeypatch.setattr(launchers, "PROGRAM", (str(cluster / "driven.py"),))
    monkeypatch.setattr(launchers, "ASK_S", 0.5)
    at_work = launchers.at_work

    def find(run: Path) -> str | None:
        number: str | None = at_work(run)
        (run / "found").touch() if number else None
        return number

    monkeypatch.setattr(launchers, "at_work", find)
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    words = ["seed=0,1,2", "launch.slurm.time=10", "sweep.launcher=slurm", "sweep.jobs=3", "run_dir=driven"]
    assert cli.main(["train", "-m", *words]) == 85
    assert cli.main(["train", "-m", "--resume", "driven"]) == 1
    until(lambda: ended(Path("driven/001")), Path("driven/001"))
    told = moetrain(cluster, "launch", "status", "driven").splitlines()
    assert "COMPLETED" in told[0] and "COMPLETED, restarted 1 times" in told[1] and "CANCELLED" in told[2], told
    assert cli.main(["train", "-m", "--resume", "driven"]) == 0
    starts = sorted(Path("driven/started").read_text().splitlines())
    assert starts == ["000 0", "001 0", "001 1", "002 0", "002 0"]


DRIVEN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run, job, starts = Path(sys.argv[-1]), os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
began, seen = run.parent / "started", run / "seen"
with began.open("a") as file:
    file.write(f"{run.name} {starts}\\n")
if run.name == "000":
    while len(began.read_text().split()) < 6:
        time.sleep(0.1)
    os.kill(int(os.environ["DRIVER"]), signal.SIGTERM)
while not (run / "found").exists() and not seen.exists():
    time.sleep(0.1)
if run.name != "000" and not seen.exists():
    seen.touch()
    subprocess.run(["scontrol", "requeue", job] if run.name == "001" else ["scancel", job])
    time.sleep(300)
(run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0, "val_loss": 3.0}) + "\\n")
(run / "summary.json").write_text(json.dumps({"exit_reason": "finished"}))
"""

SWEPT = """
import os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[-1])
def save(*_):
    (run / "saved").touch()
    sys.exit(85)
signal.signal(signal.SIGUSR1, save)
if run.name == "001" and not (run / "saved").exists():
    (run / "waits").touch()
    time.sleep(300)
(run / "done").write_text(os.environ.get("SLURM_RESTART_COUNT", "0"))
"""
