"""The page of a sweep: its runs by rank, what the keys did to the metric, and how to run the best again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moetrain.config.errors import ConfigError
from moetrain.report.page import compared, html, section
from moetrain.report.parallel import Column, numbers_of, parallel
from moetrain.report.read import Run, read_run
from moetrain.report.scaling import scaling
from moetrain.report.svg import card, table

FULL = ("finished", "the data has run out")
SHOWN = 10  # runs in the charts over steps
SIZES = ("ladder", "model", "train")  # where nothing else differs, losses follow sizes and tokens


@dataclass
class Entry:
    """One run of a sweep. run: None where it has written no metrics. value: the metric, None without one."""

    name: str
    words: dict[str, str]
    ended: str
    run: Run | None
    value: float | None


@dataclass
class SweepRuns:
    """A sweep, its runs by rank: finished ones by the metric, then those stopped early, at work, or without metrics."""

    folder: Path
    metric: str
    low: bool
    sampler: str
    config_dirs: list[str]
    entries: list[Entry]

    @property
    def keys(self) -> list[str]:
        """The keys in which the words of the runs differ."""
        keys = dict.fromkeys(key for entry in self.entries for key in entry.words)
        return [key for key in keys if len({entry.words.get(key) for entry in self.entries}) > 1]


def read_sweep_runs(folder: Path) -> SweepRuns:
    """The sweep in ``folder``. Raises ConfigError: sweep.yaml cannot be read, or no run has begun."""
    try:
        tree: Any = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8")) or {}
        settings = dict(tree.get("sweep", {}))
        runs = {str(name): [str(word) for word in words] for name, words in dict(tree.get("runs", {})).items()}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        raise ConfigError(f"report {folder}: sweep.yaml is damaged; give the folders of its runs instead") from None
    runs = runs or {path.parent.name: [] for path in sorted(folder.glob("*/metrics.jsonl"))}
    metric, low = str(settings.get("metric", "val_loss")), settings.get("goal", "min") == "min"
    entries = [_entry(folder / name, words, metric) for name, words in runs.items()]
    if not any(entry.run for entry in entries):
        raise ConfigError(f"report {folder}: no run of this sweep has written metrics yet; wait for the first log step")

    def rank(entry: Entry) -> tuple[int, float]:
        group = 0 if entry.ended in FULL else 1 if entry.ended.startswith("pruned") else 2
        value = entry.value if entry.value is not None else float("inf") if low else float("-inf")
        return (3 if entry.value is None else group), value if low else -value

    dirs = [str(one) for one in tree.get("config_dirs", [])]
    return SweepRuns(folder, metric, low, str(settings.get("sampler", "grid")), dirs, sorted(entries, key=rank))


def _entry(folder: Path, words: Sequence[str], metric: str) -> Entry:
    try:
        run: Run | None = read_run(folder)
    except ConfigError:
        run = None
    try:
        ended = str(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["exit_reason"])
    except (OSError, ValueError, KeyError, TypeError):
        ended = "" if not (folder / "config.yaml").exists() else f"at step {run.rows[-1]['step']}" if run else "begun"
    pairs = (word.partition("=") for word in words)
    return Entry(folder.name, {key: value for key, _, value in pairs}, ended, run, run.last(metric) if run else None)


def sweep_page(sweep: SweepRuns) -> str:
    """The whole HTML page."""
    name = sweep.folder.resolve().name
    ranked = [entry for entry in sweep.entries if entry.run is not None and entry.value is not None]
    shown = [entry.run for entry in ranked[:SHOWN] if entry.run]
    many = f", best {SHOWN} of {len(ranked)} runs" if len(ranked) > SHOWN else ""
    body = [f"<h1>{escape(name)}</h1>", *notes(sweep), best(sweep), ranking(sweep)]
    if ranked and sweep.keys:
        body.append(section("What the keys did", keys(sweep, ranked)))
    if all(key.lstrip("+").split(".")[0] in SIZES for key in sweep.keys):
        full = [(entry.run, entry.value) for entry in ranked if entry.ended in FULL]
        body.append(section("Scaling law", scaling(full, sweep.metric)))
    body.append(section(f"Training{many}", compared(shown)))
    return html(f"sweep {name}", body)


def notes(sweep: SweepRuns) -> Iterator[str]:
    """What the sweep is, how far it is, and what is wrong with it."""
    ends = [entry.ended for entry in sweep.entries]
    done, cut = sum(end in FULL for end in ends), sum(end.startswith("pruned") for end in ends)
    goal = "low" if sweep.low else "high"
    yield f"<p>{len(ends)} runs by {escape(sweep.sampler)}: {done} finished, {cut} stopped early, "
    yield f"{len(ends) - done - cut} not finished. Ranked by {escape(sweep.metric)}, {goal} is good.</p>"
    if all(entry.value is None for entry in sweep.entries):
        yield f'<p class="note">No run has written {escape(sweep.metric)}, so there is no rank; set another with '
        yield f"moetrain train -m --resume {escape(shlex.quote(str(sweep.folder)))} sweep.metric=NAME</p>"


def best(sweep: SweepRuns) -> str:
    """The command that runs the best one again."""
    first = sweep.entries[0]
    if first.value is None or first.ended not in FULL or not first.words:
        return ""
    words = [f"{k}={v}" for k, v in first.words.items() if k != "run_dir" and not k.startswith("sweep.")]
    dirs = [word for folder in sweep.config_dirs for word in ("--config-dir", folder)]
    command = shlex.join(["moetrain", "train", *dirs, *words])
    line = f"Best: run {escape(first.name)}, {escape(sweep.metric)} {first.value:.4f}. To run it again by itself:"
    return f'<p>{line}</p><pre class="command"><code>{escape(command)}</code></pre>'


def ranking(sweep: SweepRuns) -> str:
    """One line per run."""
    head = ["", "run", sweep.metric, *sweep.keys, "step", "ended"]
    rows = []
    for place, entry in enumerate(sweep.entries, 1):
        value = "" if entry.value is None else f"{entry.value:.4f}" if abs(entry.value) < 1e4 else f"{entry.value:.5g}"
        step = str(entry.run.rows[-1]["step"]) if entry.run else ""
        values = [short(entry.words.get(key, "")) for key in sweep.keys]
        rows.append([str(place) if value else "", entry.name, value, *values, step, entry.ended or "not begun"])
    return table(head, rows)


def short(text: str) -> str:
    """A drawn number with four digits; other words as they are."""
    try:
        return f"{float(text):.4g}" if len(text) > 7 else text
    except ValueError:
        return text


def keys(sweep: SweepRuns, ranked: Sequence[Entry]) -> Iterator[str]:
    """The parallel coordinates, and how much each key explains by itself."""
    columns = [Column(key, [entry.words.get(key) for entry in ranked]) for key in sweep.keys]
    columns.append(Column(sweep.metric, [entry.value for entry in ranked]))
    cut = [entry.ended not in FULL for entry in ranked]
    yield parallel("Runs across the keys", columns, [f"run {entry.name}" for entry in ranked], cut)
    full = [entry for entry in ranked if entry.ended in FULL]
    losses = np.array([entry.value for entry in full])
    shares = [(key, importance([entry.words.get(key, "") for entry in full], losses)) for key in sweep.keys]
    known = sorted(((key, share) for key, share in shares if share is not None), key=lambda pair: -pair[1])
    if known:
        bars = "".join(
            f'<div class="bar"><span>{escape(key)}</span><i style="width:{60 * share:.1f}%"></i>{share:.2f}</div>'
            for key, share in known
        )
        note = ("<p>Share of the variance of the finished runs' ranks that a key explains alone: numbers by a parabola "
                "through their ranks, names by the mean of each; adjusted for the number of runs.</p>")  # fmt: skip
        yield card("Weight of each key", bars + note)


def importance(values: Sequence[str], metric: np.ndarray) -> float | None:
    """The adjusted R² of the metric's ranks on ``values``; None where there are too few runs to tell."""
    numbers, names = numbers_of(values), sorted(set(values))
    if numbers is not None and len(names) > 2:
        x = ranks(np.array(numbers, dtype=np.float64))
        design = np.column_stack([np.ones(len(x)), x, x**2])
    else:
        design = np.array([[value == name for name in names] for value in values], dtype=np.float64)
    n, free = len(metric), len(metric) - np.linalg.matrix_rank(design) if len(metric) else 0
    if free < 3 or len(names) < 2:
        return None
    y = ranks(metric)
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    spread = ((y - y.mean()) ** 2).sum()
    return None if spread == 0 else float(max(0.0, 1 - (rest**2).sum() / spread * (n - 1) / free))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 to 1, equal values share the mean of theirs."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    same = (values[None, :] == values[:, None]).sum(axis=1)
    return (below + (same - 1) / 2) / max(1, len(values) - 1)
