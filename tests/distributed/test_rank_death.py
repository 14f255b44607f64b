"""A rank dies, hangs or fails in the middle of a step.

Promises: every other rank ends within ``parallel.timeout_s``, not with code 0, and its one line names the lost rank and
the way back; the checkpoints that are there are whole, or are passed over; a resumed run gives the same losses, bit for
bit, as one that nothing happened to. Under a launcher that stops the other ranks (torchrun, or ``launch.ranks``), and
under one that does not (srun).

The mapping has a pipeline, so that not every rank talks to the lost one.
"""

from __future__ import annotations

import json
import multiprocessing.context
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moetrain_launch import local
from moetrain_launch.fork import run_ranks
from torch._C._distributed_c10d import ErrorType

import moetrain.train  # noqa: F401 ranks are forked with everything imported
from moetrain import cli
from moetrain.checkpoint import layout, newest
from moetrain.checkpoint.layout import DamagedError
from moetrain.train.exit_codes import LOST
from moetrain.train.runtime import timeout_of_new_groups
from moetrain.train.watch import GRACE_S, LostRank, Watch, watched
from tests.distributed.toy_run import BASE

ROOT = Path(__file__).resolve().parents[2]
WORLD, STEPS, TIMEOUT_S = 4, 10, 10
MARGIN_S = 30  # for a busy machine
SETTINGS = [
    *(word for word in BASE if not word.startswith(("train.steps=", "train.global_batch="))),
    f"train.steps={STEPS}",
    "train.threads=1",
    "train.micro_batch=1",
    "train.global_batch=4",
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "log.every=1",
    "export.at_end=false",
    "generate.prompts=[]",
    "device=cpu",
    "parallel.pp=2",
    "parallel.ep=2",
    f"parallel.timeout_s={TIMEOUT_S}",
]


class World:
    """Ranks as srun starts them: each with its place in the environment, and nobody who looks after them.

    Forked from this process rather than started anew, only to save the time of the imports.
    """

    def __init__(self, folder: Path, words: list[str], folders: dict[int, Path] | None = None) -> None:
        """folders: ranks that work in another folder, as on a node with its own copy of the data."""
        self.logs = folder / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.codes: dict[int, int] = {}
        self.pids = [self._start(rank, port, (folders or {}).get(rank, folder), words) for rank in range(WORLD)]

    def _start(self, rank: int, port: str, folder: Path, words: list[str]) -> int:
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            os.chdir(folder)
            for stream, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(self.logs / f"{stream}-{rank}", os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
            os.environ.update({name: str(number) for name, number in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            sys.argv = ["moetrain", "train", *words]
            cli.entry()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def wait(self, ranks: set[int], seconds: float) -> float:
        """Wait until ``ranks`` have ended; how long it took."""
        began = time.monotonic()
        while not ranks <= self.codes.keys():
            for rank in ranks - self.codes.keys():
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
            took = time.monotonic() - began
            assert took < seconds, f"ranks {ranks - self.codes.keys()} are still there after {took:.0f} s: {self}"
            time.sleep(0.01)
        return time.monotonic() - began

    def error(self, rank: int) -> str:
        """The one line that a rank ended with."""
        text = (self.logs / f"err-{rank}").read_text()
        lines = [line for line in text.splitlines() if line.startswith("moetrain: error: ")]
        assert len(lines) == 1 and "Traceback" not in text, text
        return lines[0]

    def __str__(self) -> str:
        texts = [f"--- rank {rank}\n{(self.logs / f'err-{rank}').read_text()[-1500:]}" for rank in range(WORLD)]
        return f"{self.codes}\n" + "\n".join(texts)

    def close(self) -> None:
        for rank in set(range(WORLD)) - self.codes.keys():
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)


def run(folder: Path, words: list[str]) -> None:
    world = World(folder, words)
    try:
        world.wait(set(range(WORLD)), 120)
        assert set(world.codes.values()) == {0}, world
    finally:
        world.close()


def curve(run_dir: Path) -> list[tuple[float, ...]]:
    """(loss, gradient norm) of every step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]


def wait_for_a_random_moment(run_dir: Path) -> None:
    """In the middle of some step, once there are checkpoints."""
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    steps, end = draw.randrange(3, 6), time.monotonic() + 90
    log = run_dir / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < steps or not list(run_dir.glob("checkpoints/step-?")):
        assert time.monotonic() < end, "no step was done"
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.2))


def assert_checkpoints_are_whole(run_dir: Path) -> None:
    """Whatever has the name of a checkpoint is one; others are left-overs, which a resumed run clears."""
    steps = layout.steps(run_dir / "checkpoints")
    for step in steps:
        path = layout.path_of(run_dir / "checkpoints", step)
        try:
            for name, expected in layout.read_manifest(path).items():
                layout.check_file(path, name, expected)
        except DamagedError as error:
            pytest.fail(f"{path}: {error}")
    assert newest(run_dir / "checkpoints") == layout.path_of(run_dir / "checkpoints", steps[0])


@pytest.fixture(scope="module")
def straight(prepared: Path) -> list[str]:
    """Settings of a run that has gone through without a fault as ``straight`` (in ``prepared``)."""
    sources = [f"data.sources.{name}={{paths:['{prepared / name}.txt']}}" for name in ("letters", "digits")]
    data = ["data=own", "data.name=toy", "data.dir=prepared", "data.tokenizer.vocab_size=300", *sources]
    settings = [*SETTINGS, *data]
    run(prepared, [*settings, f"run_dir={prepared / 'straight'}"])
    return settings


@pytest.mark.parametrize(("how", "lost"), [("dies saving", 2), ("dies", 0), ("hangs", 1), ("fails", 3)])
def test_under_a_launcher_that_leaves_the_other_ranks_alone(
    how: str, lost: int, prepared: Path, straight: list[str]
) -> None:
    """Rank 0 hosts the store through which the others would hear of it. Rank 2 dies while a checkpoint is written in
    the background, which the others must not finish without it. Rank 3 has its own copy of the data, which goes bad."""
    run_dir, own = prepared / how.replace(" ", "-"), prepared / "own"
    shutil.copytree(prepared / "prepared", own / "prepared", dirs_exist_ok=True)
    world = World(prepared, [*straight, f"run_dir={run_dir}"], {3: own})
    others = set(range(WORLD)) - {lost}
    try:
        wait_for_a_random_moment(run_dir)
        while how == "dies saving" and not list(run_dir.glob("checkpoints/step-*.tmp")):
            time.sleep(0.001)
        if how == "fails":
            for shard in (own / "prepared").glob("*.train.bin"):
                with shard.open("r+b") as file:
                    file.write(b"\xff" * shard.stat().st_size)
        else:
            os.kill(world.pids[lost], signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
        took = world.wait(others, TIMEOUT_S + MARGIN_S)
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        print(f"the others ended after {took:.1f} s; there are {left}")
        if how == "hangs":
            os.kill(world.pids[lost], signal.SIGCONT)
        world.wait({lost}, MARGIN_S)
        for rank in others:
            line = world.error(rank)
            assert world.codes[rank] == LOST, world
            assert f"rank {lost}" in line and "last good checkpoint: " in line, line
            assert line.endswith(f"to go on: moetrain train --resume {run_dir}"), line
            if how == "fails":
                assert "past the vocabulary" in line, line  # the reason, where it does not show by itself
        if how == "fails":
            assert world.codes[lost] == 2 and "past the vocabulary" in world.error(lost), world
        elif how == "hangs":
            assert world.codes[lost] == LOST, world
    finally:
        world.close()
    assert_checkpoints_are_whole(run_dir)
    run(prepared, ["--resume", str(run_dir)])
    assert curve(run_dir) == curve(prepared / "straight")


def test_with_ranks_that_moetrain_started_itself(prepared: Path, straight: list[str]) -> None:
    """As a user does it, from the command line."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "launch"))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": path}

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "moetrain.cli", "train", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=prepared, env=environment, stdout=pipe, stderr=pipe, text=True)

    process = start(*straight, "run_dir=own-ranks", f"launch.ranks={WORLD}", "faults.restarts=0")
    try:
        wait_for_a_random_moment(prepared / "own-ranks")
        os.kill(rank_of(process.pid, 2), signal.SIGKILL)
        _, err = process.communicate(timeout=TIMEOUT_S + MARGIN_S)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGKILL
    [line] = [line for line in err.splitlines() if line.startswith("moetrain: error: ")]
    assert "rank 2 was ended by SIGKILL" in line, err
    assert line.endswith("to go on: moetrain train --resume own-ranks") and "Traceback" not in err
    assert_checkpoints_are_whole(prepared / "own-ranks")
    run(prepared, ["--resume", "own-ranks"])
    assert curve(prepared / "own-ranks") == curve(prepared / "straight")


def test_groups_that_others_make_give_up_as_soon_as_the_default_one() -> None:
    """Those of a mesh, say, in which a pipeline would wait half an hour for a stage that does not send."""

    def wait_for_one_that_does_not_send() -> None:
        store = dist.distributed_c10d._get_default_store()
        with timeout_of_new_groups(timedelta(seconds=1)):
            group = dist.new_group()
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
                dist.recv(torch.zeros(1), 1, group=group)
            store.set("given up", "")
        else:
            store.wait(["given up"])

    run_ranks(2, wait_for_one_that_does_not_send)


def as_ranks(port: int, folder: Path, rank: int, work: Callable[[int], None]) -> None:
    """``work`` on ``rank`` of two, watched; a LostRank's text goes to a file in ``folder``."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    try:
        with watched(600, str(folder)):
            work(rank)
    except LostRank as error:
        (folder / f"lost-{rank}").write_text(str(error))
        os._exit(LOST)


def start_two(folder: Path, work: Callable[[int], None]) -> list[multiprocessing.context.ForkProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_ranks, args=(port, folder, rank, work), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def test_a_rank_that_dies_is_missed_also_where_no_collective_fails(tmp_path: Path) -> None:
    """With NCCL the others wait for their GPUs, and hear of nothing."""

    def work(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    ranks = start_two(tmp_path, work)
    try:
        ranks[0].join(20 + MARGIN_S)
        assert ranks[0].exitcode == LOST
        assert "rank 1 (process" in (tmp_path / "stacks" / "rank-0.txt").read_text()
    finally:
        for process in ranks:
            process.kill()


def test_what_a_collective_says_is_in_the_line_where_nobody_is_lost(tmp_path: Path) -> None:
    """As NCCL's errors at a first step: of the network, or of two ranks on one GPU."""

    def work(rank: int) -> None:
        if rank == 0:
            raise dist.DistBackendError("NCCL error: invalid usage\nDuplicate GPU detected : rank 1 and rank 0")
        time.sleep(600)

    ranks = start_two(tmp_path, work)
    try:
        ranks[0].join(20 + MARGIN_S)
        assert ranks[0].exitcode == LOST
        line = (tmp_path / "lost-0").read_text()
        assert "a collective failed" in line and "rank 0 met: NCCL error: invalid usage Duplicate GPU" in line
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize("late_s", [0.0, GRACE_S + 1])
def test_a_rank_says_its_line_once_however_late_its_main_thread_hears(
    late_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 stays for the others to read the verdict, and meets it itself meanwhile; then nothing keeps it."""

    def said(line: str, code: int) -> None:
        (tmp_path / "lost-0-by-watch").write_text(line)
        time.sleep(1)  # for the main thread to say it as well

    monkeypatch.setattr(local, "show_error", said)
    monkeypatch.setattr(Watch, "_stay", lambda self: time.sleep(GRACE_S + 2))

    def work(rank: int) -> None:
        if rank == 1:
            raise ValueError("an error of its own")
        stacks = tmp_path / "stacks" / "rank-0.txt"
        while not stacks.exists() or not stacks.read_text():
            time.sleep(0.01)
        time.sleep(late_s)
        raise dist.DistBackendError("connection reset by peer")

    ranks = start_two(tmp_path, work)
    try:
        ranks[0].join(20 + MARGIN_S)
        assert ranks[0].exitcode == LOST
        [line] = [file.read_text() for file in tmp_path.glob("lost-0*")]
        assert "rank 1 (process" in line and "an error of its own" in line
    finally:
        for process in ranks:
            process.kill()


class Nccl:
    """A group as NCCL's watchdog leaves it; python sees no more of it than this."""

    _device_types = (torch.device("cuda"),)

    def __init__(self) -> None:
        self.error = ErrorType.SUCCESS

    def _get_backend(self, device: torch.device) -> Nccl:
        return self

    def get_error(self) -> ErrorType:
        return self.error


def test_a_collective_of_the_gpu_that_gives_up_is_noticed_before_nccl_aborts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks live; rank 0 stands where it waits for its GPU, rank 1 has not come to the collective."""
    group: Any = Nccl()

    def work(rank: int) -> None:
        monkeypatch.setitem(dist.distributed_c10d._world.pg_map, group, ("nccl", None))
        time.sleep(3)  # nothing has failed yet
        assert not (tmp_path / "stacks" / "rank-0.txt").read_text()
        if rank == 0:
            group.error = ErrorType.TIMEOUT
        time.sleep(600)

    ranks = start_two(tmp_path, work)
    try:
        for rank, process in enumerate(ranks):
            process.join(20 + MARGIN_S)
            assert process.exitcode == LOST
            line = (tmp_path / "stacks" / f"rank-{rank}.txt").read_text().splitlines()[0]
            assert "a collective failed or took too long" in line and "behind: rank 1 (process" in line
    finally:
        for process in ranks:
            process.kill()


def rank_of(parent: int, rank: int) -> int:
    """Id of the child of ``parent`` that is rank ``rank``."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ppid = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if ppid == parent and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    return int(entry.name)
            except OSError:
                continue
    raise AssertionError(f"rank {rank} of process {parent} is not there")
