"""What guards, metrics, spans, checks and snapshots cost: step times with all of them, as by default, and without.

The loop of the trainer with everything that it does between steps, on one rank and on two (gloo, one thread each), on
the demo's model and batch. Contestants live in processes of their own and take turns of ten steps; a turn ends when its
snapshot has. Two processes that do the same differ by some percent for as long as they live, so each stretch of 40
steps (with two snapshots) has new ones. Shown are ratios of sums over all turns, of time and of processor time (all
ranks and threads; other work on the machine disturbs it less), and the standard error of the first over the stretches.

off: no line of metrics, no spans, no checksums, no snapshot, no look for spikes, no agreement on signals.
on: everything at its default: metrics of every step, TensorBoard and the bar among them; spans of every step; checksums
every 100 steps; a snapshot every 20. The others (--parts): off but for one of them.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BASE = ["experiment=demo", "device=cpu", "train.threads=1", "checkpoint.every=0", "train.eval_every=0"]
OFF = {
    "metrics": ["log.every=1000000", "log.tensorboard=false", "log.progress=false"],
    "spans": ["train.profile.time_split=false"],
    "checks": ["faults.checksum_every=0"],
    "guard": ["faults.spike=0"],
    "snapshot": ["train.snapshot.every=0"],
}
Turns = dict[str, list[float]]  # of each contestant
WARM, TURN, STRETCH = 10, 10, 4  # steps before, steps of a turn, turns of a stretch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py overhead``."""
    parser.add_argument("--rounds", type=int, default=6, help="stretches of 40 steps of each contestant")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to measure with")
    parser.add_argument("--parts", action="store_true", help="also each part alone")
    parser.add_argument("--words", nargs="*", default=[], help="settings of all contestants, as optim.lr=0.001")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run all contests; prints a table row for each contestant and returns what goes into the JSON file."""
    if min(args.rounds, *args.ranks) < 1:
        raise SystemExit("bench: --rounds and --ranks must be at least 1")
    from bench_step import machine

    import moetrain.train  # noqa: F401  # forked with everything imported
    from moetrain import config
    from moetrain.data.prepare import prepare
    from moetrain.data.toy import toy_data

    names = ["off", "on", *(OFF if args.parts else [])]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(toy_data(folder), progress=False)
        for world in args.ranks:
            split = [f"launch.ranks={world}", f"parallel.ep={world}"]
            split.append(f"train.steps={WARM + TURN * STRETCH + 1}")
            wall: Turns = {name: [] for name in names}
            cpu: Turns = {name: [] for name in names}
            for number in range(args.rounds):
                cfgs = {}
                for name in names if number % 2 else reversed(names):  # whoever is first has no advantage
                    run_dir = folder / f"{name}-{world}-{number}"
                    cfgs[name] = config.load([*BASE, *split, f"run_dir={run_dir}", *without(name), *args.words])
                    cfgs[name].data = toy_data(folder, cfgs[name].data)
                    (run_dir / "checkpoints").mkdir(parents=True)
                contest(cfgs, world, wall, cpu)
            rows += [row_of(name, world, wall, cpu) for name in names]
    return {"command": " ".join(sys.argv), "machine": machine(), "rows": rows}


def without(name: str) -> list[str]:
    """The words that leave contestant ``name`` only with what it is called after."""
    return [word for part, words in OFF.items() if name not in ("on", part) for word in words]


def contest(cfgs: dict[str, Any], world: int, wall: Turns, cpu: Turns) -> None:
    """One stretch of all contestants on ``world`` ranks, in turns; adds seconds of a step in each turn."""
    context = mp.get_context("fork")
    pipes: dict[str, list[Connection]] = {}
    processes = []
    for name, cfg in cfgs.items():
        pipes[name] = []
        for rank in range(world):
            here, there = context.Pipe()
            pipes[name].append(here)
            processes.append(context.Process(target=rank_of, args=(name, cfg, rank, world, there)))
            processes[-1].start()
            there.close()
    try:
        for number in range(STRETCH + 1):
            for name in list(cfgs) if number % 2 else list(reversed(cfgs)):
                for pipe in pipes[name]:
                    pipe.send("go")
                took = [pipe.recv() for pipe in pipes[name]]
                if number:  # the first is the way to the first turn
                    wall[name].append(max(seconds for seconds, _ in took) / TURN)
                    cpu[name].append(sum(seconds for _, seconds in took) / TURN)
    except EOFError:
        raise SystemExit("bench: a rank died; its error is above") from None
    finally:
        for process in processes:
            process.kill()
            process.join()


def row_of(name: str, world: int, wall: Turns, cpu: Turns) -> dict[str, Any]:
    """One contestant's figures; printed, too."""

    def sums(turns: list[float]) -> list[float]:
        return [sum(turns[i : i + STRETCH]) for i in range(0, len(turns), STRETCH)]

    def overhead(of: dict[str, list[float]]) -> tuple[float, list[float]]:
        parts = [mine / off - 1 for mine, off in zip(sums(of[name]), sums(of["off"]), strict=True)]
        return sum(of[name]) / sum(of["off"]) - 1, parts

    (in_time, by_time), (in_cpu, by_cpu) = overhead(wall), overhead(cpu)
    error = statistics.stdev(by_time) / len(by_time) ** 0.5 if len(by_time) > 1 else float("nan")
    seconds = statistics.fmean(wall[name])
    print(f"{world} ranks  {name:9} {seconds:.4f} s/step  time {100 * in_time:+.1f}% (+- {100 * error:.1f})  "
          f"processor {100 * in_cpu:+.1f}%", flush=True)  # fmt: skip
    return {"ranks": world, "contestant": name, "seconds": seconds, "cpu_seconds": statistics.fmean(cpu[name]),
            "overhead": in_time, "standard_error": error, "overheads": by_time,
            "cpu_overhead": in_cpu, "cpu_overheads": by_cpu}  # fmt: skip


def rank_of(name: str, cfg: Any, rank: int, world: int, pipe: Connection) -> None:
    """Body of one rank: the trainer's own loop, which waits for its turns."""
    code = 1
    try:
        import torch.distributed as dist

        from moetrain.config.check import resolve_sizes
        from moetrain.train.runtime import set_up_torch
        from moetrain.train.trainer import Trainer

        run_dir = Path(cfg.run_dir)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.dup2(os.open(run_dir / "progress", os.O_WRONLY | os.O_CREAT), 2)  # where the bar goes
        set_up_torch(cfg, world)
        store = dist.FileStore(str(run_dir / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        if name not in ("on", "metrics"):
            leave_out_metrics()
        if name not in ("on", "guard"):
            leave_out_guard()
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, world), run_dir)
        trainer.train_step = in_turns(trainer, pipe)  # type: ignore[method-assign]
        trainer.fit()
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(code)


def in_turns(trainer: Any, pipe: Connection) -> Callable[[], dict[str, Any]]:
    """The trainer's step, which at the end of a turn says how long it took, and waits for the next turn."""
    step, began, used = trainer.train_step, 0.0, 0.0

    def train_step() -> dict[str, Any]:
        nonlocal began, used
        if trainer.step == 0 or (trainer.step >= WARM and (trainer.step - WARM) % TURN == 0):
            if trainer.snapshots.kept is not None:
                trainer.snapshots.kept.wait()
            if trainer.step:
                pipe.send((time.perf_counter() - began, time.process_time() - used))
            if trainer.step == trainer.cfg.train.steps - 1:
                trainer.snapshots.forget()
            pipe.recv()
            began, used = time.perf_counter(), time.process_time()
        result: dict[str, Any] = step()
        return result

    return train_step


def leave_out_metrics() -> None:
    """In a rank: nothing is written."""
    from moetrain.train.sinks import Writer

    Writer.write = Writer.count = lambda *_: None  # type: ignore[method-assign, assignment]


def leave_out_guard() -> None:
    """In a rank: an update needs a finite loss and gradient, and nobody asks the other ranks."""
    from moetrain.train.guard import Guard
    from moetrain.train.step import both_finite

    Guard.accept = lambda _, loss, grad_norm: both_finite(loss, grad_norm)  # type: ignore[method-assign, assignment]
