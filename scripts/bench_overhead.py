"""What guards, metrics, spans, checks and snapshots cost: step times with all of them, as by default, and without.

The loop of the trainer with everything that it does between steps, on one rank and on two (gloo, one thread each), on
the demo's model and batch. One run is all contestants in turn: for 20 steps everything is on, for the next 20 nothing
is, and so on, first the one and then the other; between two runs that do the same there are some percent that have
nothing to do with what is compared, and a machine's speed changes within seconds. A turn ends when its snapshot has;
the first turns are not counted, in which the slots of the snapshots are made (0.1 s each, once a run).

off: no line of metrics, no spans, no checksums, no snapshot, no look for spikes, no agreement on signals.
on: metrics of every step, TensorBoard and the bar among them; spans of every step; guard; a snapshot every 20 steps,
all as by default, and checksums every 20 steps, where the default is 100. The others (--parts): off but for one.

Shown are ratios of sums over all turns, of time and of processor time (all threads of all ranks; other work on the
machine disturbs it less), and the standard error of the first, from the ratios of neighbouring turns.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BASE = ["experiment=demo", "device=cpu", "train.threads=1", "checkpoint.every=0", "train.eval_every=0"]
PARTS = ("metrics", "spans", "checks", "guard", "snapshot")
NEVER = 10**9
TURN, WARM = 20, 3  # steps of a turn; turns before the first that counts
Turns = dict[str, list[float]]  # of each contestant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py overhead``."""
    parser.add_argument("--rounds", type=int, default=16, help="turns of 20 steps of each contestant")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to measure with")
    parser.add_argument("--parts", action="store_true", help="also each part alone")
    parser.add_argument("--words", nargs="*", default=[], help="settings of the run, as optim.lr=0.001")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run on all numbers of ranks; prints a table row for each contestant and returns what goes into the JSON file."""
    if min(args.rounds, *args.ranks) < 1:
        raise SystemExit("bench: --rounds and --ranks must be at least 1")
    from bench_step import machine

    import moetrain.train  # noqa: F401  # forked with everything imported
    from moetrain import config
    from moetrain.data.prepare import prepare
    from moetrain.data.toy import toy_data

    names = ["off", "on", *(PARTS if args.parts else ())]
    turns = ["on"] * WARM + [name for i in range(args.rounds) for name in (names if i % 2 else reversed(names))]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(toy_data(folder), progress=False)
        for world in args.ranks:
            run_dir = folder / f"run-{world}"
            (run_dir / "checkpoints").mkdir(parents=True)
            split = [f"launch.ranks={world}", f"parallel.ep={world}", f"run_dir={run_dir}"]
            split.append(f"train.steps={TURN * len(turns) + 1}")
            cfg = config.load([*BASE, *split, *args.words])
            cfg.data = toy_data(folder, cfg.data)
            took = run(cfg, world, turns)
            wall = {n: [max(s for s, _ in took[i]) / TURN for i in counted(turns, n)] for n in names}
            cpu = {n: [sum(s for _, s in took[i]) / TURN for i in counted(turns, n)] for n in names}
            rows += [row_of(name, world, wall, cpu) for name in names]
    return {"command": " ".join(sys.argv), "machine": machine(), "rows": rows}


def counted(turns: list[str], name: str) -> list[int]:
    """Places of a contestant's turns that count."""
    return [i for i, turn in enumerate(turns) if i >= WARM and turn == name]


def run(cfg: Any, world: int, turns: list[str]) -> list[list[tuple[float, float]]]:
    """One run on ``world`` ranks; of each turn and rank the seconds, and those of processors."""
    context = mp.get_context("fork")
    pipes: list[Connection] = []
    for rank in range(world):
        here, there = context.Pipe()
        pipes.append(here)
        context.Process(target=rank_of, args=(cfg, rank, world, turns, there), daemon=True).start()
        there.close()
    try:
        return [[pipe.recv() for pipe in pipes] for _ in turns]
    except EOFError:
        raise SystemExit("bench: a rank died; its error is above") from None


def row_of(name: str, world: int, wall: Turns, cpu: Turns) -> dict[str, Any]:
    """One contestant's figures; printed, too."""
    by_time = [mine / off - 1 for mine, off in zip(wall[name], wall["off"], strict=True)]
    in_time, in_cpu = (sum(of[name]) / sum(of["off"]) - 1 for of in (wall, cpu))
    error = statistics.stdev(by_time) / len(by_time) ** 0.5 if len(by_time) > 1 else float("nan")
    seconds = statistics.fmean(wall[name])
    print(f"{world} ranks  {name:9} {seconds:.4f} s/step  time {100 * in_time:+.1f}% (+- {100 * error:.1f})  "
          f"processor {100 * in_cpu:+.1f}%", flush=True)  # fmt: skip
    return {"ranks": world, "contestant": name, "seconds": seconds, "cpu_seconds": statistics.fmean(cpu[name]),
            "overhead": in_time, "standard_error": error, "overheads": by_time, "cpu_overhead": in_cpu}  # fmt: skip


def rank_of(cfg: Any, rank: int, world: int, turns: list[str], pipe: Connection) -> None:
    """Body of one rank: the trainer's own loop, of which parts are switched on and off."""
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
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, world), run_dir)
        take_turns(trainer, turns, pipe)
        trainer.fit()
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(1)


def take_turns(trainer: Any, turns: list[str], pipe: Connection) -> None:
    """Have the trainer's step switch parts on and off between turns, and tell through ``pipe`` how long each took."""
    from moetrain.train import trainer as module
    from moetrain.train.sinks import Writer
    from moetrain.train.step import both_finite

    step, accept, count, spans_of = trainer.train_step, trainer.guard.accept, Writer.count, module.Spans
    on: set[str] = set()
    spans: list[Any] = []
    began = used = 0.0

    def make_spans(*args: Any) -> Any:
        spans.append(spans_of(*args))
        return spans[0]

    def switch(name: str) -> None:
        on.clear()
        on.update(PARTS if name == "on" else [name])
        trainer.cfg.log.every = 1 if "metrics" in on else NEVER
        spans[0].every = 1 if "spans" in on else 0
        trainer.cfg.faults.checksum_every = TURN if "checks" in on else 0
        trainer.snapshots.every = TURN if "snapshot" in on else 0

    def train_step() -> dict[str, Any]:
        nonlocal began, used
        if trainer.step % TURN == 0:
            if trainer.snapshots.kept is not None:
                trainer.snapshots.kept.wait()
            if trainer.step:
                pipe.send((time.perf_counter() - began, time.process_time() - used))
            if trainer.step == TURN * len(turns):
                trainer.snapshots.forget()
                os._exit(0)
            switch(turns[trainer.step // TURN])
            began, used = time.perf_counter(), time.process_time()
        result: dict[str, Any] = step()
        return result

    module.Spans = make_spans  # type: ignore[assignment, misc]
    trainer.train_step = train_step
    trainer.guard.accept = lambda *of: accept(*of) if "guard" in on else both_finite(*of)
    Writer.count = lambda *of: count(*of) if "metrics" in on else None  # type: ignore[method-assign, assignment]
