"""What upcycling is worth, at equal tokens and at equal time: ``compare_upcycling.py real|branches FOLDER``.

real: a dense model (``scripts/smollm2.py`` makes SmolLM2-135M) and upcycled ones, each trained on a domain that it is
weak at, by default the manual pages and books in other languages than English of ``scripts/corpora.py``.

branches: a small dense model is trained on three domains, and a branch of it on each alone; Branch-Train-MiX and BAM
(attention experts too, with their own keys and values or shared ones) each make one model of the branches, which is
trained on all three. Beside them the branches, and a model with experts from scratch that has as many tokens as all
that one such model took.

One job after the other, each with all cores. FOLDER gets a directory per run, results.json and results.md. A finished
run is not repeated, one that was killed is resumed. Everything is done by the commands that a user has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REAL = {
    "sparse, 8 experts, top 2": ["method=sparse", "num_experts=8", "top_k=2"],
    "virtual groups, 32 experts, top 8": ["method=virtual_group", "num_experts=32", "granularity=4", "top_k=8"],
    "Drop-Upcycling, 8 experts, top 2": ["method=drop", "num_experts=8", "top_k=2", "ratio=0.5"],
}
# A dense model of 2.4M parameters, and experts of its width instead of its MLPs.
DENSE = [
    "model=tiny",
    "model.family=auto",
    "model.moe.num_experts=0",
    "model.dim=192",
    "model.n_layers=4",
    "model.dense_dim=512",
    "model.vocab_size=2048",
]
EXPERTS = ["model.moe.num_experts=3", "model.moe.top_k=2", "model.moe.expert_dim=512"]
TRAINING = [
    "train.seq_len=256",
    "train.global_batch=8",
    "train.micro_batch=8",
    "optim.lr=2e-3",
    "schedule.warmup_steps=20",
]
MIXES = {
    "BTX": ["method=btx"],
    "BAM, own keys": ["method=bam"],
    "BAM, shared keys": ["method=bam", "shared_kv=true"],
}
BRANCHES = ("novels", "docs", "code")
QUIET = ["log.progress=false", "log.tensorboard=false", "checkpoint.asynchronous=false", "export.verify=false"]


class Failed(Exception):
    """A command failed; the text says which, and its last line."""


def command(*words: str) -> str:
    """Run ``moetrain WORDS``; what it printed. Raises Failed."""
    job = subprocess.run([sys.executable, "-m", "moetrain.cli", *words], capture_output=True, text=True)
    if job.returncode:
        raise Failed(f"moetrain {words[0]} ...: {(job.stderr.strip().splitlines() or ['no message'])[-1]}")
    return job.stdout


@dataclass(frozen=True)
class Run:
    """A finished run: its summary, and (tokens, seconds of steps, held-out loss) of every evaluation."""

    summary: dict[str, Any]
    curve: list[tuple[int, float, float]]

    def sizes(self) -> list[str]:
        """Parameters, all and those that a token meets."""
        return [f"{self.summary[key] / 1e6:,.1f}M" for key in ("params_total", "params_active")]

    def loss_at(self, seconds: float) -> float:
        """The held-out loss after so much time: between evaluations on a straight line, at the ends as there."""
        before = (0, 0.0, self.curve[0][2])
        for point in self.curve:
            if point[1] >= seconds:
                share = (seconds - before[1]) / (point[1] - before[1])
                return before[2] + share * (point[2] - before[2])
            before = point
        return before[2]


def train(folder: Path, words: list[str]) -> Run:
    """Train, resume, or only read what is finished."""
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["exit_reason"] != "finished":
        if list(folder.glob("checkpoints/step-*/manifest.json")):
            words = ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            words = [*words, f"run_dir={folder}", *QUIET]
        print(f"train {folder.name}", file=sys.stderr, flush=True)
        command("train", *words)
    curve, seconds = [], 0.0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds += row["step_s"]
        if "val_loss" in row:
            curve.append((row["tokens"], seconds, row["val_loss"]))
    return Run(json.loads(summary.read_text()), curve)


def upcycle(out: Path, words: list[str]) -> dict[str, Any]:
    """Make ``out`` once; the command's JSON line."""
    report = out.with_suffix(".json")
    if not report.exists() or not out.is_dir():
        shutil.rmtree(out, ignore_errors=True)
        print(f"upcycle {out.name}", file=sys.stderr, flush=True)
        report.write_text(command("upcycle", *words, f"out={out}").strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def real(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """The dense model and its upcycled ones on a domain that it is weak at."""
    data = [
        "data=own", "data.name=weak", f"data.dir={args.folder / 'prepared'}", f"data.sources.weak.paths=[{args.text}]",
        f"data.tokenizer.path={args.model}", "data.val_fraction=0.02",
    ]  # fmt: skip
    command("prepare", *data)
    steps = args.steps or 200
    common = [
        *data, "balance=[aux_loss]", f"train.steps={steps}", "train.seq_len=256", "train.global_batch=4",
        "train.micro_batch=4", "train.precision=bf16", f"train.eval_every={max(1, steps // 8)}",
        "train.eval_sequences=64", "optim.lr=3e-4", "schedule.warmup_steps=20",
        f"checkpoint.every={max(1, steps // 2)}", "checkpoint.keep=1",
        *args.override,
    ]  # fmt: skip
    runs, starts = {"dense": train(args.folder / "dense", [f"init={args.model}", *common])}, {}
    for name, words in REAL.items():
        folder = args.folder / words[0].removeprefix("method=")
        starts[name] = upcycle(folder.with_name(folder.name + "-start"), [*words, f"from={args.model}", *sample(args)])
        runs[name] = train(folder, [f"init={folder.with_name(folder.name + '-start')}", *common])
    time = min(run.curve[-1][1] for run in runs.values())
    rows = []
    for name, run in runs.items():
        step0 = next(iter(starts.values()))["losses_before"][0] if name == "dense" else starts[name]["loss_after"]
        tokens, seconds, loss = run.curve[-1]
        at_end = [f"{tokens:,}", f"{loss:.4f}", f"{seconds:.0f}"]
        rows.append([name, *run.sizes(), f"{step0:.4f}", *at_end, f"{run.loss_at(time):.4f}"])
    heads = ["model", "parameters", "active", "text before", "tokens", "loss", "s", f"loss after {time:.0f} s"]
    return heads, rows


def sample(args: argparse.Namespace) -> list[str]:
    """Words of ``upcycle``: a text to measure losses on at step 0."""
    return [] if args.sample is None else [f"text={args.sample}", "tokens=8192"]


def branches(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """A seed, its branches, what is made of them, and a model from scratch."""
    n = args.steps or 300
    data = ["data=demo", f"data.dir={args.folder / 'prepared'}", "~data.sources.plays", "~data.sources.jargon"]
    settings = [*TRAINING, *data, "train.eval_sequences=100", "checkpoint.keep=1", *args.override]
    all_steps = n * (2 + len(BRANCHES))  # of the seed, the branches, and what is made of them
    found: list[tuple[str, int, Run]] = []  # name, steps in all, run

    def add(title: str, name: str, steps: int, in_all: int, words: list[str]) -> None:
        run = train(args.folder / name, [*words, *settings, f"train.steps={steps}"])
        found.append((title, in_all, run))

    add("seed, all domains", "seed", n, n, DENSE)
    for name in BRANCHES:
        alone = [f"data.sources.{other}.weight={int(other == name)}" for other in BRANCHES]
        add(f"branch, {name}", name, n, 2 * n, [f"init={args.folder / 'seed'}", *alone])
    parents = ",".join(str(args.folder / name) for name in BRANCHES)
    for title, words in MIXES.items():
        name = title.lower().replace(", ", "-").replace(" ", "-")
        begin = args.folder / f"{name}-start"
        upcycle(begin, [*words, f"from={parents}", "to=moetrain"])
        add(f"{title}, then all domains", name, n, all_steps, [f"init={begin}", "balance=[aux_loss]"])
    add("from scratch, 3 experts, top 2", "scratch", all_steps, all_steps, [*DENSE, *EXPERTS, "balance=[aux_loss]"])
    rows = []
    for title, steps, run in found:
        losses = [run.summary["val_loss_by_domain"][domain] for domain in BRANCHES]
        losses.append(sum(losses) / len(losses))
        tokens = steps * run.summary["tokens"] // run.summary["steps"]
        rows.append([title, *run.sizes(), f"{tokens:,}", *(f"{loss:.4f}" for loss in losses)])
    return ["model", "parameters", "active", "tokens in all", *BRANCHES, "mean"], rows


def main() -> int:
    """Do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["real", "branches"])
    parser.add_argument("folder", type=Path, help="where the runs and the results go")
    parser.add_argument("--model", type=Path, default=Path("smollm2"), help="real: the dense model")
    parser.add_argument("--text", default="corpora/multilingual", help="real: what is trained on")
    parser.add_argument("--sample", type=Path, help="real: a text to measure losses on before training")
    parser.add_argument("--steps", type=int, default=0, help="of each run (default: 200, or 300 for branches)")
    parser.add_argument("override", nargs="*", help="more settings of all runs, key=value")
    args = parser.parse_intermixed_args()
    if args.steps < 0:
        parser.error("--steps must be at least 1")
    if args.what == "real" and not (args.model / "config.json").is_file():
        parser.error(f"--model: '{args.model}' is no model folder; 'python scripts/smollm2.py {args.model}' makes one")
    args.folder, args.model = args.folder.resolve(), args.model.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        heads, rows = {"real": real, "branches": branches}[args.what](args)
    except Failed as error:
        print(f"compare_upcycling: error: {error}", file=sys.stderr)
        return 1
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    (args.folder / "results.md").write_text("\n".join(lines) + "\n")
    found = [dict(zip(heads, row, strict=True)) for row in rows]
    (args.folder / "results.json").write_text(json.dumps({"command": sys.argv, "rows": found}, indent=1) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
