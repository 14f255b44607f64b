"""Online mixers against fixed weights at equal tokens, on five real domains: ``compare_mixers.py FOLDER``.

Launches ``moetrain train experiment=domains`` for proportional and uniform (stratified) weights, Aioli and DGA, each
with every seed, two runs at a time with one thread each, and reads what they report. FOLDER gets a directory per run,
results.json and results.md. A finished run is not repeated, one that was killed is resumed. First make the text:
``python scripts/corpora.py corpora``.

Equal tokens: all that a run computes gradients on is counted. Aioli's probes are training steps like others. DGA
computes a gradient per domain and one of the target besides, so its runs have fewer steps. Forward passes that measure
losses are not training; the table gives them. Mixers measure on training text, so that the held-out text, on which
all are judged at the end, stays unseen. The average is that of the domains' losses, each with the same weight, as in
Aioli's paper.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALL = ["prose", "code_go", "code_python", "docs", "man_en", "dictionary", "multilingual"]
SEQ_LEN, BATCH = 128, 16
MEASURED = 8  # sequences of each domain on which Aioli measures a loss
# What is the same for all: a model that takes about 150 s of one thread, 4.0M parameters, and text in 2,048 tokens.
COMMON = f"""
experiment=domains data.name=compare data.tokenizer.vocab_size=2048 model.vocab_size=2048 model.dim=128
model.n_layers=2 model.attention.n_heads=4 model.attention.n_kv_heads=2 model.moe.num_experts=4
model.moe.expert_dim=256 train.seq_len={SEQ_LEN} train.global_batch={BATCH} train.micro_batch={BATCH} train.threads=1
train.eval_every=0 train.eval_sequences=400 checkpoint.at_end=false log.progress=false log.tensorboard=false
log.every=1
""".split()

RUNNING: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Method:
    """``settings``: overrides. ``every``: steps between updates. ``gradients``: batches that an update computes
    gradients on besides training, for each of k domains and the target. ``evaluations``: sweeps of Aioli's probes,
    each of k evaluations."""

    name: str
    settings: tuple[str, ...]
    every: int = 0
    gradients: int = 0
    evaluations: int = 0


AIOLI = ("mixer=aioli", "mixer.text=train")
METHODS = [
    Method("proportional", ("data.mixture=proportional",)),
    Method("uniform", ("data.mixture=uniform",)),
    Method("aioli", (*AIOLI, "data.mixture=uniform"), every=100, evaluations=4),
    Method("aioli-few-probes", (*AIOLI, "data.mixture=uniform"), every=100, evaluations=1),
    Method(
        "dga", ("mixer=dga", "data.mixture=uniform", "mixer.text=train", "mixer.cosine=true"), every=50, gradients=1
    ),
]


@dataclass(frozen=True)
class Plan:
    """A run: its words, its steps, and where it goes."""

    method: Method
    seed: int
    folder: Path
    steps: int
    words: list[str]


def plan(method: Method, seed: int, args: argparse.Namespace) -> Plan:
    """The run of a method, with as many steps as the tokens allow."""
    k, steps = len(args.domains), args.steps
    if method.gradients:
        steps = round(args.steps / (1 + method.gradients * (k + 1) / method.every))
    words = [*COMMON, *(f"~data.sources.{name}" for name in ALL if name not in args.domains), *method.settings]
    if method.every:
        words.append(f"mixer.every={method.every}")
    if method.evaluations:
        words += [
            f"mixer.sequences={MEASURED}",
            f"mixer.sweeps={method.evaluations}",
            f"mixer.probe_steps={args.probe}",
        ]
    folder = args.folder / f"{method.name}-{seed}"
    words += [f"data.dir={args.folder / 'prepared'}", f"run_dir={folder}", f"seed={seed}", f"train.steps={steps}",
              f"checkpoint.every={max(1, steps // 4)}", *args.override]  # fmt: skip
    return Plan(method, seed, folder, steps, words)


def result(run: Plan) -> dict[str, Any] | None:
    """The summary of a finished run, else None."""
    try:
        summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if summary.get("exit_reason") == "finished" and summary["steps"] == run.steps else None


def launch(run: Plan) -> str:
    """Start or resume a run and wait for it; '' or, in one line, what went wrong."""
    words = run.words
    if list(run.folder.glob("checkpoints/step-*/manifest.json")):
        words = ["--resume", str(run.folder)]
    elif run.folder.exists():
        shutil.rmtree(run.folder)  # killed before its first checkpoint
    command = [sys.executable, "-m", "moetrain.cli", "train", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as job:
        RUNNING.add(job)
        _, said = job.communicate()
    RUNNING.discard(job)
    print(f"{run.folder.name}: {'done' if job.returncode == 0 else 'failed'}", file=sys.stderr, flush=True)
    lines = [line for line in said.splitlines() if line.strip()]
    return "" if job.returncode == 0 else f"{run.folder.name}: {(lines or ['no message'])[-1]}"


def stop(*_: object) -> None:
    """End the runs with this program; they can be resumed."""
    for job in list(RUNNING):
        job.terminate()
    os._exit(143)


def measured_tokens(run: Plan, args: argparse.Namespace) -> tuple[int, int]:
    """Tokens of gradients besides training, and of forward passes, that the mixer of a run took (counted from what it
    was asked to do; the metrics say how often it did)."""
    k, updates, losses = len(args.domains), 0, 0
    for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        updates += "mixture" in row and row["step"] > 1
        losses += "mixture" in row
    gradients = run.method.gradients * (k + 1) * updates * BATCH * SEQ_LEN
    forward = losses * k * MEASURED * SEQ_LEN if run.method.evaluations else 0
    return gradients, forward


def collect(runs: list[Plan], args: argparse.Namespace) -> dict[str, Any]:
    """Per method: mean and deviation over the seeds of every domain's loss and of their average, and tokens."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(run.method for run in runs):
        mine = [(run, summary) for run in runs if run.method is method and (summary := result(run))]
        losses = {name: [s["val_loss_by_domain"][name] for _, s in mine] for name in args.domains}
        losses["average"] = [statistics.mean(values) for values in zip(*losses.values(), strict=True)]
        tokens = [measured_tokens(run, args) for run, _ in mine]
        found[method.name] = {
            "seeds": [run.seed for run, _ in mine],
            "losses": losses,
            "mean": {name: statistics.mean(values) for name, values in losses.items()},
            "std": {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in losses.items()},
            "tokens_trained": mine[0][1]["tokens"],
            "tokens_gradients": round(statistics.mean(t[0] for t in tokens)),
            "tokens_forward": round(statistics.mean(t[1] for t in tokens)),
            "seconds": round(statistics.mean(s["seconds"] for _, s in mine)),
        }
    return found


def markdown(found: dict[str, Any], args: argparse.Namespace) -> str:
    """The table: a row per method, mean and standard deviation over the seeds in nats per token."""
    names = [*args.domains, "average"]
    lines = [
        f"| method | {' | '.join(names)} | trained | gradients | forward | s |",
        "| --- |" + " --- |" * (len(names) + 4),
    ]
    for method, row in found.items():
        cells = [f"{row['mean'][name]:.3f} ± {row['std'][name]:.3f}" for name in names]
        counts = [f"{row[key] / 1000:,.0f}K" for key in ("tokens_trained", "tokens_gradients", "tokens_forward")]
        lines.append(f"| {method} | {' | '.join([*cells, *counts, str(row['seconds'])])} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line. Ends with one line where it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs and the results go")
    parser.add_argument("--steps", type=int, default=400, help="steps of the runs with fixed weights")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N")
    parser.add_argument("--methods", default=",".join(m.name for m in METHODS), metavar="NAME,NAME")
    parser.add_argument("--domains", default="prose,code_go,docs,man_en,multilingual", metavar="NAME,NAME")
    parser.add_argument("--probe", type=int, default=2, help="steps of a probe of Aioli")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time")
    parser.add_argument("override", nargs="*", help="more settings of all runs, key=value")
    args = parser.parse_intermixed_args()
    if min(args.steps, args.probe, args.at_once) < 1:
        parser.error("--steps, --probe and --at-once must be at least 1")
    for name, known in (
        ("methods", [m.name for m in METHODS]),
        ("domains", ALL),
        ("seeds", [str(n) for n in range(1000)]),
    ):
        given = getattr(args, name).split(",")
        bad = [word for word in given if word not in known]
        if bad or len(set(given)) < len(given):
            parser.error(f"--{name}: '{(bad or given)[0]}' is not known or there twice; known: {', '.join(known[:8])}")
        setattr(args, name, given)
    args.seeds = [int(seed) for seed in args.seeds]
    if len(args.domains) < 2:
        parser.error("--domains needs two names or more")
    wrong = [word for word in args.override if "=" not in word]
    if wrong:
        parser.error(f"'{wrong[0]}' is not a setting; write key=value")
    args.folder = args.folder.resolve()
    return args


def main() -> int:
    """Prepare, launch what is not finished, write the results."""
    args = parse()
    signal.signal(signal.SIGTERM, stop)
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = [plan(m, seed, args) for seed in args.seeds for m in METHODS if m.name in args.methods]
    todo = [run for run in runs if result(run) is None]
    if todo:  # once, before two runs want to
        command = [sys.executable, "-m", "moetrain.cli", "prepare", *todo[0].words]
        if subprocess.run(command).returncode:
            return 1
    with ThreadPoolExecutor(args.at_once) as pool:
        wrong = [message for message in pool.map(launch, todo) if message]
    for message in wrong:
        print(f"compare_mixers: error: {message}", file=sys.stderr)
    if wrong:
        return 1
    found = collect(runs, args)
    text = markdown(found, args)
    (args.folder / "results.json").write_text(json.dumps({"command": sys.argv, "methods": found}, indent=1) + "\n")
    (args.folder / "results.md").write_text(text + "\n")
    print(text)
    print(json.dumps({name: row["mean"] for name, row in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
