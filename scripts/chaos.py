"""Faults at random moments, and what they cost: nothing.

    python scripts/chaos.py --seed 7 [--faults 20] [--ranks 4]

Trains a toy model on gloo ranks of this machine twice: left alone, and with faults at moments that follow from the seed
(as far as a machine's timing does). Ranks are started as srun does, by nobody who looks after them, and started again
when they have ended; they go on from the newest snapshot (every 2 steps) or checkpoint (every 6), and the steps that
are done again are counted. The losses and gradient norms of all steps must be the same, bit for bit. Both runs have one
batch that always gives NaN: its update is skipped, and it is listed.

    kill     SIGKILL to one rank
    term     SIGTERM to all: they save, and end with code 85
    stop     SIGSTOP to one rank: the others notice, write their stacks, and end
    damage   a byte of the newest checkpoint is changed, and a rank killed
    disk     the disk of the checkpoints is full for a while (a tmpfs; without the right to mount one, writes fail)
    nan      one rank's loss is NaN, once
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import moetrain.train
from moetrain import cli, config
from moetrain.checkpoint import layout
from moetrain.checkpoint.writer import _HashingStream
from moetrain.data.prepare import prepare
from moetrain.data.toy import toy_data
from moetrain.train.engine import TorchEngine
from moetrain.train.exit_codes import LOST, REQUEUE
from moetrain.train.snapshots import forget

KINDS = ("kill", "term", "stop", "damage", "disk", "nan")
WORDS = [
    "model.vocab_size=300", "model.dim=24", "model.n_layers=2", "model.attention.n_heads=4", "model.dense_dim=32",
    "model.attention.n_kv_heads=2", "model.attention.head_dim=8", "model.moe.num_experts=8", "model.moe.top_k=2",
    "model.moe.expert_dim=16", "model.moe.first_dense=1", "train.seq_len=16", "train.global_batch=8",
    "train.micro_batch=1", "train.threads=1", "train.eval_sequences=4", "optim.lr=0.003", "log.tensorboard=false",
    "log.progress=false",
    "checkpoint.every=6", "checkpoint.keep=4", "train.snapshot.every=2", "parallel.ep=2", "parallel.timeout_s=10",
    "device=cpu", "faults.checksum_every=5", "faults.retry_after=6",
]  # fmt: skip
POISONED = 7  # the step, from 0, whose batch is always bad
TMPFS_MIB = 24  # four checkpoints to keep, one that is damaged, one that is being written
WAIT_S = 600
FULL, NAN_RANK, STEP, LIMIT = range(4)  # places in the memory that harness and ranks share


class Shared:
    """Numbers that the ranks see change."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 32)

    def __getitem__(self, place: int) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * place)[0])

    def __setitem__(self, place: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * place, value)


def make_faulty(shared: Shared, rank: int) -> None:
    """In a rank: a poisoned batch, a NaN on demand, a disk that is full on demand, and a gate before each step, so that
    faults come while the run is still under way."""
    backward: Any = TorchEngine._backward
    write = _HashingStream.write

    def faulty_backward(engine: Any, inputs: Any, scale: Any, step: int) -> Any:
        shared[STEP] = step + 1
        while step >= shared[LIMIT]:
            time.sleep(0.002)
        sums = backward(engine, inputs, scale, step)
        if set(engine.chaos_samples) & set(range(8 * POISONED, 8 * POISONED + 8)):
            sums[0] += float("nan")
        elif shared[NAN_RANK] == rank + 1:
            shared[NAN_RANK] = 0
            sums[0] += float("nan")
        return sums

    step_of: Any = TorchEngine.train_step

    def train_step(engine: Any, batches: Any, *rest: Any) -> Any:
        engine.chaos_samples = [i for batch in batches for i in batch.sample_ids]
        return step_of(engine, batches, *rest)

    def faulty_write(stream: _HashingStream, data: Any) -> int:
        if shared[FULL]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(stream, data)

    TorchEngine._backward = faulty_backward  # type: ignore[method-assign]
    TorchEngine.train_step = train_step  # type: ignore[method-assign]
    _HashingStream.write = faulty_write  # type: ignore[method-assign]


class World:
    """The ranks of one life of the run."""

    def __init__(self, cfg: config.Config, ranks: int, shared: Shared, logs: Path) -> None:
        self.codes: dict[int, int] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = [self._start(cfg, rank, ranks, port, shared, logs) for rank in range(ranks)]

    def _start(self, cfg: config.Config, rank: int, ranks: int, port: int, shared: Shared, logs: Path) -> int:
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            output = os.open(logs / f"rank-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({name: str(n) for name, n in place.items()}, MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(port)
            make_faulty(shared, rank)
            try:
                moetrain.train.run(cfg, resume=True)
                code = 0
            except Exception as error:
                code = cli.report(error)
        finally:
            os._exit(code)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def send(self, number: signal.Signals, ranks: list[int]) -> None:
        for rank in ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def close(self) -> None:
        while not self.poll():
            self.send(signal.SIGKILL, list(range(len(self.pids))))
            time.sleep(0.01)


class Chaos:
    """One run with faults in ``folder``."""

    def __init__(self, cfg: config.Config, ranks: int, seed: int, faults: int, folder: Path) -> None:
        self.cfg, self.ranks, self.draw = cfg, ranks, random.Random(seed)
        kinds = [KINDS[i % len(KINDS)] for i in range(faults)]
        self.draw.shuffle(kinds)
        self.kinds = kinds
        self.shared, self.logs = Shared(), folder / "logs"
        self.logs.mkdir(exist_ok=True)
        self.checkpoints = Path(cfg.run_dir) / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(self.checkpoints)]
        self.mounted = "disk" in kinds and subprocess.run(mount, capture_output=True).returncode == 0
        self.world: World | None = None
        self.lost: list[int] = []  # steps that were done again after each lost rank
        self.from_snapshots = 0

    def run(self) -> None:
        """Start, disturb and start again until the run has ended. Raises AssertionError for an end that no fault
        explains."""
        try:
            for number, kind in enumerate(self.kinds, 1):
                world = self._alive()
                target = self.shared[STEP] + self.draw.randint(1, 5)
                self.shared[LIMIT] = target + 3
                self._until(lambda target=target: self.shared[STEP] >= target, world)  # type: ignore[misc]
                time.sleep(self.draw.uniform(0, 0.1))
                began, step = time.monotonic(), self.shared[STEP]
                what = getattr(self, f"_{kind}")(world)
                print(f"fault {number:2}: {kind:6} {what} in step {step}: {time.monotonic() - began:.1f} s", flush=True)
            self.shared[LIMIT] = 2**40
            self._end(self._alive(), {0})
        finally:
            if self.world is not None:
                self.world.close()
            forget(Path(self.cfg.run_dir))
            if self.mounted:
                kept = [p.name for p in self.checkpoints.iterdir()]
                subprocess.run(["umount", "-l", str(self.checkpoints)], check=False)
                print(f"at the end there were {', '.join(sorted(kept))}")

    def _alive(self) -> World:
        if self.world is None:
            done, self.shared[STEP] = self.shared[STEP] - 1, 0
            self.world = World(self.cfg, self.ranks, self.shared, self.logs)
            self._until(lambda: self.shared[STEP] > 0, self.world)
            self._count(done)
        return self.world

    def _count(self, done: int) -> None:
        """What the end after ``done`` steps has cost, by the line with which the ranks went on."""
        log = Path(self.cfg.run_dir) / "log.txt"
        told = re.findall(r"(resumed from .*?step[ -](\d+)|starting from step (0))", log.read_text())
        if told and done >= 0:
            line, *steps = told[-1]
            self.lost.append(max(0, done - int("".join(steps))))
            self.from_snapshots += "snapshot" in line

    def _until(self, condition: Callable[[], bool], world: World) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert not world.poll(), f"the run has ended by itself: {world.codes}, see {self.logs}"
            assert time.monotonic() < end, f"waited too long, see {self.logs}"
            time.sleep(0.005)

    def _end(self, world: World, codes: set[int]) -> None:
        """Wait until all ranks have ended, each with one of ``codes``."""
        end = time.monotonic() + WAIT_S
        while not world.poll():
            assert time.monotonic() < end, f"ranks are left: {world.codes}, see {self.logs}"
            time.sleep(0.01)
        assert set(world.codes.values()) <= codes, f"{world.codes}, see {self.logs}"
        self.world = None

    def _kill(self, world: World) -> str:
        rank = self.draw.randrange(self.ranks)
        world.send(signal.SIGKILL, [rank])
        self.shared[LIMIT] += 3
        self._end(world, {-signal.SIGKILL, LOST})
        return f"rank {rank}"

    def _term(self, world: World) -> str:
        world.send(signal.SIGTERM, list(range(self.ranks)))
        self.shared[LIMIT] += 3
        self._end(world, {REQUEUE})
        return "all"

    def _stop(self, world: World) -> str:
        rank, stacks = self.draw.randrange(self.ranks), Path(self.cfg.run_dir) / "stacks"
        shutil.rmtree(stacks, ignore_errors=True)
        world.send(signal.SIGSTOP, [rank])
        self.shared[LIMIT] += 3
        end = time.monotonic() + WAIT_S
        while not world.poll() and len(world.codes) < self.ranks - 1:
            assert time.monotonic() < end, f"ranks are left: {world.codes}, see {self.logs}"
            time.sleep(0.01)
        found = sum("File " in path.read_text() for path in stacks.glob("rank-*.txt"))
        assert found >= self.ranks - 1, f"stacks of {found} ranks in {stacks}"
        world.send(signal.SIGKILL, [rank])
        self._end(world, {-signal.SIGKILL, LOST})
        return f"rank {rank}"

    def _damage(self, world: World) -> str:
        what = "(no checkpoint to spare)"
        steps = layout.steps(self.checkpoints)
        if len(steps) > 1:
            path = layout.path_of(self.checkpoints, steps[0])
            file = max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)
            with file.open("r+b") as opened:
                opened.seek(self.draw.randrange(file.stat().st_size))
                byte = opened.read(1)
                opened.seek(-1, os.SEEK_CUR)
                opened.write(bytes([byte[0] ^ 255]))
            what = f"of {path.name}"
        return f"{what}, {self._kill(world)}"

    def _disk(self, world: World) -> str:
        log = Path(self.cfg.run_dir) / "log.txt"
        before = log.read_text().count("was not saved")
        filler = self.checkpoints / "filler"
        if self.mounted:
            # Not buffered: closing would try to write what is left, and fail
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(2**16))
        else:
            self.shared[FULL] = 1
        self.shared[LIMIT] += 9
        self._until(lambda: log.read_text().count("was not saved") > before, world)
        self.shared[FULL] = 0
        filler.unlink(missing_ok=True)
        return "full" if self.mounted else "full (writes fail)"

    def _nan(self, world: World) -> str:
        rank = self.draw.randrange(self.ranks)
        self.shared[NAN_RANK] = rank + 1
        self.shared[LIMIT] += 6
        self._until(lambda: self.shared[NAN_RANK] == 0, world)
        return f"rank {rank}"


def rows(run_dir: str) -> list[dict[str, Any]]:
    """The lines of metrics."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def prove(seed: int, faults: int, ranks: int, folder: Path) -> None:
    """Both runs in ``folder``. Raises AssertionError where they differ."""
    steps = 12 + 14 * faults
    curves = []
    for name, number in (("alone", 0), ("disturbed", faults)):
        cfg = config.load([*WORDS, f"train.steps={steps}", f"run_dir={folder / name}"])
        cfg.data = toy_data(folder)
        if name == "alone":
            prepare(cfg.data, progress=False)
        chaos = Chaos(cfg, ranks, seed, number, folder)
        chaos.run()
        curves.append([(row["step"], row["loss"], row["grad_norm"]) for row in rows(cfg.run_dir)])
    alone, disturbed = curves
    assert len(alone) == steps and [step for step, _, _ in alone] == list(range(1, steps + 1))
    different = [a[0] for a, b in zip(alone, disturbed, strict=True) if a != b]
    assert not different, f"steps {different[:10]} differ, the first of {len(different)}"
    for event in (
        e for row in rows(cfg.run_dir) for e in row.get("events", []) if e["event"] in ("skipped", "given_up")
    ):
        print(f"{event['event']}: step {event['step']}, samples {event['samples']}: {event['why']}")
    print(f"steps done again after an end: {chaos.lost}; {chaos.from_snapshots} times from a snapshot")
    print(f"{steps} steps on {ranks} ranks with {faults} faults: losses and gradient norms are the same, bit for bit")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Faults at random moments, and what they cost.")
    parser.add_argument("--seed", type=int, default=None, help="of the faults; default: drawn, and printed")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="moetrain-chaos-"))
    try:
        prove(seed, args.faults, args.ranks, folder)
    except AssertionError as error:
        print(f"chaos: seed {seed}: {error}; all files are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
