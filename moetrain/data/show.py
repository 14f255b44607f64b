"""`moetrain data RUN_DIR`: the history of a run's weights, and what has been read of its data, from its newest
checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moetrain.checkpoint import load, newest
from moetrain.config import read
from moetrain.config.errors import CheckpointError
from moetrain.data.forecast import shares


def show(run_dir: Path, console: Console) -> None:
    """Print both tables. Raises CheckpointError when the run has no checkpoint that says it."""
    path = newest(run_dir / "checkpoints", verify=False)
    if path is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet, which is where the history of the weights is")
    state: dict[str, Any] = {"train": {}}
    load(path, state)
    progress = state["train"]
    if "data" not in progress:
        raise CheckpointError(f"{path} was written before checkpoints kept the history of the weights")
    batch = read(run_dir / "config.yaml").train.global_batch
    console.print(f"{path}: step {progress['step']:,}, {progress['tokens']:,} tokens", markup=False)
    console.print(phases(progress["data"], progress["step"], batch))
    console.print(domains(progress["data"]))


def phases(data: dict[str, Any], step: int, batch: int) -> Table:
    """The phases of ``data`` (of ``position.position``, after ``step`` steps of lately ``batch`` samples)."""
    table = Table(box=None, pad_edge=False, title="weights", title_justify="left")
    for title in ("from step", "sample", "tokens", "why", "weights"):
        table.add_column(title, justify="left" if title in ("why", "weights") else "right")
    domain_of = {name: source["domain"] for name, source in data["sources"].items()}
    for phase in data["history"]:
        weights = dict.fromkeys(domain_of.values(), 0.0)
        for source, weight in phase["weights"].items():
            weights[domain_of.get(source, source)] += weight
        first = phase["first_sample"]
        at = step + (first - data["samples"]) // batch
        cells = (f"{max(at, 0):,}", f"{first:,}", f"{first * data['seq_len']:,}", phase["why"], shares(weights))
        table.add_row(*map(escape, cells))
    return table


def domains(data: dict[str, Any]) -> Table:
    """What was read of each domain, and of each source where a domain has several."""
    table = Table(box=None, pad_edge=False, title="read so far", title_justify="left")
    for title in ("domain", "tokens", "share", "asked", "passes", "samples"):
        table.add_column(title, justify="left" if title == "domain" else "right")
    asked, samples = mean_weights(data), {name: s["samples"] for name, s in data["sources"].items()}
    tokens = {name: s["samples"] * s["mean_tokens"] for name, s in data["sources"].items()}
    size = {name: s["windows"] * s["mean_tokens"] for name, s in data["sources"].items()}
    groups: dict[str, list[str]] = {}
    for name, source in data["sources"].items():
        groups.setdefault(source["domain"], []).append(name)
    for domain, names in groups.items():
        rows = [(domain, names)] + ([(f"  {name}", [name]) for name in names] if len(names) > 1 else [])
        for label, part in rows:
            read_, all_, wanted, count = (sum(of[name] for name in part) for of in (tokens, size, asked, samples))
            passes, share = read_ / max(all_, 1), read_ / max(sum(tokens.values()), 1)
            row = (label, f"{read_:,.0f}", f"{share:.2%}", f"{wanted:.2%}", f"{passes:.3g}", f"{count:,}")
            table.add_row(*map(escape, row))
    return table


def mean_weights(data: dict[str, Any]) -> dict[str, float]:
    """Source -> the share of all tokens so far that the weights asked for, over all phases."""
    found = dict.fromkeys(data["sources"], 0.0)
    ends = [phase["first_sample"] for phase in data["history"][1:]] + [data["samples"]]
    for phase, end in zip(data["history"], ends, strict=True):
        per_sample = sum(w / data["sources"][name]["mean_tokens"] for name, w in phase["weights"].items())
        samples = max(0, min(end, data["samples"]) - phase["first_sample"])
        for name, weight in phase["weights"].items():
            found[name] += samples * weight / per_sample
    total = max(sum(found.values()), 1e-300)
    return {name: tokens / total for name, tokens in found.items()}
