"""What dispatch=lsh costs in quality and saves in rows: the demo with 2 to 10 hashes, with and without residuals.

Each run is ``moetrain train experiment=demo`` with --steps steps on two gloo ranks of one thread, which split the
experts, one run after the other. "sent": rows that travel over rows that would, mean of the last quarter of the steps;
"error": root mean square distance of a row from the mean that stands for it, over that of the rows, mean of layers, in
the same steps; "loss": mean training loss of these steps, under compression; "val_loss": held-out loss at the end,
which is evaluated without compression. With --folder finished runs are kept, and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_ranks import print_table
from bench_step import machine

COMMON = [
    *("experiment=demo", "train.threads=1", "train.eval_every=0", "train.eval_sequences=100"),
    *("checkpoint.every=0", "checkpoint.at_end=false", "export.at_end=false", "generate.prompts=[]"),
    *("log.progress=false", "log.tensorboard=false"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py lsh``."""
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--hashes", type=int, nargs="+", default=[2, 4, 6, 8, 10])
    parser.add_argument("--axes", type=int, nargs="+", default=[1], help="dispatch.axes, each with all hashes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, help="where the runs go; without: a temporary folder")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train all; prints a table and returns what goes into the JSON file."""
    if min(args.steps, *args.hashes, *args.axes) < 1 or min(args.seeds) < 0:
        raise SystemExit("bench: --steps, --hashes and --axes must be at least 1, --seeds 0")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = [run(folder, seed, args.steps, name, words) for seed in args.seeds for name, words in plans(args)]
    print_table(rows)
    return {"command": " ".join(sys.argv), "machine": machine(), "rows": rows}


def plans(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name, settings) of each run of a seed."""
    found = [("uncompressed", ["dispatch=all_to_all"])]
    for axes in args.axes:
        for hashes in args.hashes:
            for residual in (True, False):
                name = f"{hashes} hashes, axes {axes}" + ("" if residual else ", no residual")
                words = [f"dispatch.hashes={hashes}", f"dispatch.axes={axes}", f"dispatch.residual={residual}"]
                found.append((name, ["dispatch=lsh", *words]))
    return found


def run(folder: Path, seed: int, steps: int, name: str, words: list[str]) -> dict[str, Any]:
    """The figures of one run; trains it unless it is finished."""
    run_dir = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"
    if not (run_dir / "summary.json").is_file():
        command = [sys.executable, "-m", "moetrain.cli", "train", *COMMON, *words, f"seed={seed}",
                   f"train.steps={steps}", f"run_dir={run_dir}", f"data.dir={folder / 'data'}"]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"bench: {name} failed: {done.stderr.strip().splitlines()[-1]}")
    summary = json.loads((run_dir / "summary.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    late = lines[-max(1, len(lines) // 4) :]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    row = {
        "run": name,
        "seed": seed,
        "sent": mean([line.get("lsh_sent_share", 1.0) for line in late]),
        "error": mean([mean(line.get("lsh_error_by_layer", [0.0])) for line in late]),
        "loss": mean([line["loss"] for line in late]),
        "val_loss": summary["val_loss"],
    }
    print(json.dumps(row), flush=True)
    return row
