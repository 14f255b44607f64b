"""A run directory as the report sees it. Whatever is missing or cut is left out and said, so that a run can be looked
at while it is written, or after it was killed."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moetrain.config.errors import ConfigError

# Of a metrics.jsonl with more bytes, lists and tables are kept of every n-th line only, and of evaluations: in memory
# they are five times as large
MOST_BYTES = 2**28
RARE = ("events", "event", "mixture")


@dataclass
class Routing:
    """Where a sample of held-out tokens was sent after ``step`` steps; see docs/run-directory.md.

    layers: numbers of the MoE layers. ids_LTK: experts of each sampled token, -1 where there is none. token_T: which
    token it is. counts_LGE: choices by domain over all held-out tokens.
    """

    step: int
    domains: list[str]
    layers: list[int]
    ids_LTK: np.ndarray
    token_T: np.ndarray
    counts_LGE: np.ndarray


@dataclass
class Run:
    """One run. rows: lines of metrics.jsonl with their steps ascending. notes: what could not be read. events: (step,
    kind, text), in order."""

    path: Path
    name: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    notes: list[str]
    events: list[tuple[int, str, str]] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the lines that have the number ``key``, "a/b" for one inside a dict or a list."""
        steps, values = [], []
        head, *path = key.split("/")
        for row in self.rows:
            value: Any = row.get(head)
            if value is None:
                continue
            for part in path:
                if isinstance(value, list):
                    value = value[int(part)] if int(part) < len(value) else None
                else:
                    value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                steps.append(float(row["step"]))
                values.append(float(value))
        return steps, values

    def last(self, key: str) -> float | None:
        """The last finite value of ``key``."""
        return next((v for v in reversed(self.series(key)[1]) if math.isfinite(v)), None)

    def keys_in(self, key: str) -> list[str]:
        """Names (or places) inside the dicts (or lists) that lines have under ``key``, in order of appearance."""
        found: dict[str, None] = {}
        for row in self.rows:
            value = row.get(key)
            if isinstance(value, dict):
                found |= dict.fromkeys(map(str, value))
            elif isinstance(value, list):
                found |= dict.fromkeys(map(str, range(len(value))))
        return list(found)


def read_run(path: Path) -> Run:
    """The run in ``path``. Raises ConfigError when there is no run, or no whole line of metrics yet."""
    if not path.is_dir():
        raise ConfigError(f"report {path}: there is no such folder")
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise ConfigError(f"report {path}: not a run directory, it has no metrics.jsonl; give the folder of a run")
    notes: list[str] = []
    every = 1 + file.stat().st_size // MOST_BYTES
    found: dict[int, dict[str, Any]] = {}  # of a step that is there twice, the later line
    for n, row in enumerate(read_lines(file, notes)):
        if isinstance(row.get("step"), int):
            found[row["step"]] = row if n % every == 0 or "val_loss" in row else _numbers(row)
    if not found:
        raise ConfigError(f"report {path}: metrics.jsonl has no whole line yet; wait for the first log step")
    rows = sorted(found.values(), key=lambda row: row["step"])
    run = Run(path, path.resolve().name, rows, _config(path, notes), _summary(path), notes)
    run.loads = [row for row in read_lines(path / "loads.jsonl", notes) if "counts" in row and "step" in row]
    run.routing = list(_routing(path, notes))
    run.events = sorted(dict.fromkeys(_events(run)), key=lambda event: event[0])
    return run


def read_lines(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON lines file; at the end a note says how many could not be read. None where it is not
    there."""
    if not file.is_file():
        return
    bad = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line.decode("utf-8", errors="replace"))
            except ValueError:
                bad += bool(line.strip())
                continue
            if isinstance(row, dict):
                yield row
            else:
                bad += 1
    if bad:
        notes.append(f"{file.name}: {bad} line{'s' if bad > 1 else ''} cut or damaged, left out")


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` without its lists and tables, but for those that few lines have."""
    return {key: v for key, v in row.items() if not isinstance(v, list | dict) or key in RARE}


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    """The config as it is written: a report needs no schema, and reads runs of other versions."""
    try:
        tree = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, dict):
        notes.append("config.yaml: missing or damaged, settings are not shown")
        return {}
    return tree


def _summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _routing(path: Path, notes: list[str]) -> Iterator[Routing]:
    files = [(int(f.stem.removeprefix("step-")), f) for f in path.glob("routing/step-*.npz") if f.stem[5:].isdigit()]
    for step, file in sorted(files):
        try:
            with np.load(file, allow_pickle=False) as z:
                yield Routing(
                    step,
                    [str(name) for name in z["domains"]],
                    [int(n) for n in z["layers"]],
                    z["ids_LTK"].astype(np.int64),
                    z["token_T"],
                    z["counts_LGE"],
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            notes.append(f"routing/{file.name}: damaged, left out")


def _events(run: Run) -> Iterator[tuple[int, str, str]]:
    """Restarts from the log, checkpoints that are kept, and whatever lines of metrics report under ``event(s)``."""
    try:
        log = (run.path / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        log = ""
    for match in re.finditer(r"resumed from (?:\S*step-|the snapshot of step )(\d+)", log):
        yield int(match[1]), "restart", f"resumed from step {match[1]}"
    for folder in run.path.glob("checkpoints/step-*"):
        if folder.name[5:].isdigit():
            yield int(folder.name[5:]), "save", f"checkpoint of step {folder.name[5:]}"
    for row in run.rows:
        found = row.get("events", row.get("event", []))
        for event in found if isinstance(found, list) else [found]:
            if isinstance(event, dict) and event.get("event") == "save":  # no more than its folder says
                yield row["step"], "save", f"checkpoint of step {event.get('step')}"
                continue
            text = ", ".join(f"{k} {v}" for k, v in event.items()) if isinstance(event, dict) else str(event)
            yield row["step"], "event", text
