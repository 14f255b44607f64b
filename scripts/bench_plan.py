"""``moetrain plan`` on this machine's CPU: predicted against measured time and memory of a step, for six mappings.

First ``moetrain plan calibrate`` measures the machine; then every mapping trains the demo's model, one thread a rank,
and is predicted from what calibration found. Time: the median of --steps steps of the slowest rank. Memory: the most
bytes that rank 0 had from torch's allocator at any moment, by torch's profiler, from before the model was built until
the second step had ended; predicted: weights, gradients, optimizer, activations and what a layer works with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_ranks import on_ranks, print_table
from bench_step import machine

BASE = ["experiment=demo", "device=cpu", "train.threads=1", "log.tensorboard=false", "train.snapshot.every=0",
        "checkpoint.every=0", "train.steps=1000"]  # fmt: skip
MAPPINGS = {
    "one rank": (1, "parallel.ep=1"),
    "dp": (2, "parallel.ep=1"),
    "dp, ep": (2, "parallel.ep=2"),
    "tp, etp": (2, "parallel.tp=2 parallel.ep=1 parallel.etp=2"),
    "pp": (2, "parallel.pp=2 parallel.ep=1 train.micro_batch=2"),
    "cp, ep": (2, "parallel.cp=2 parallel.ep=2 train.recompute=full"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py plan``."""
    parser.add_argument("--steps", type=int, default=20, help="steps to take the median of")
    parser.add_argument("--cluster", help="a cluster file, in place of calibrating")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, predict, run; prints a table and returns what goes into the JSON file."""
    from moetrain import config
    from moetrain.data.prepare import prepare
    from moetrain.data.toy import toy_data
    from moetrain.planner import calibrate, plan_check
    from moetrain.planner.candidates import precision_of
    from moetrain.planner.cluster import load_cluster
    from moetrain.planner.search import Problem

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = args.cluster or str(folder / "here.yaml")
        if not args.cluster:
            print(calibrate.run([f"out={file}", "ranks=2"]))
        prepare(toy_data(folder), progress=False)
        for number, (label, (world, words)) in enumerate(MAPPINGS.items()):
            split = [f"launch.ranks={world}", f"run_dir={folder / str(number)}", *words.split()]
            cfg = config.load([*BASE, *split])
            plan = plan_check.predict(Problem(cfg, load_cluster(file), world, precisions=(precision_of(cfg),)))
            cfg.data = toy_data(folder, cfg.data)
            Path(cfg.run_dir).mkdir()
            ranks = on_ranks(world, of_rank, cfg, world, args.steps)
            seconds, gib = max(rank["seconds"] for rank in ranks), ranks[0]["bytes"] / 2**30
            rows.append({
                "mapping": label, "words": words, "ranks": world, "predicted_s": plan.seconds, "seconds": seconds,
                "time_error": plan.seconds / seconds - 1, "predicted_gib": plan.by_stage[0] / 2**30, "gib": gib,
                "memory_error": plan.by_stage[0] / 2**30 / gib - 1, "split": plan.parts,
            })  # fmt: skip
    shown = ("mapping", "predicted_s", "seconds", "time_error", "predicted_gib", "gib", "memory_error")
    print_table([{name: row[name] for name in shown} for row in rows])
    for row in rows:
        print(f"  {row['mapping']}: " + ", ".join(f"{part} {1e3 * s:.0f} ms" for part, s in row["split"].items() if s))
    return {"command": " ".join(sys.argv), "machine": machine(), "rows": rows}


def of_rank(cfg: Any, world: int, steps: int) -> dict[str, float]:
    """On one rank: seconds of a step, and the most bytes of torch's allocator."""
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from moetrain.config.check import resolve_sizes
    from moetrain.train.runtime import set_up_torch
    from moetrain.train.trainer import Trainer

    set_up_torch(cfg, world)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        trainer = Trainer(cfg, resolve_sizes(cfg.parallel, world), Path(cfg.run_dir))
        for _ in range(2):
            trainer.train_step()
    trace = Path(cfg.run_dir) / f"memory-{dist.get_rank()}.json"
    found.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    most = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    for _ in range(3):
        trainer.train_step()
    seconds = statistics.median(timed(trainer.train_step) for _ in range(steps))
    return {"seconds": seconds, "bytes": float(most)}


def timed(run: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
