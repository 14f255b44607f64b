"""`moetrain watch RUN`: a run in the terminal while it is written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moetrain.config.errors import ConfigError
from moetrain.report.svg import number

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60
SHOWN = {
    "loss": "loss",
    "val_loss": "held-out loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "tokens/s",
    "memory_gib": "memory, GiB",
    "load_max_over_mean": "fullest expert / mean",
    "dead_experts": "dead experts",
    "router_entropy": "router entropy",
}
KEPT = ("step", "tokens", "step_s", *SHOWN)  # of a line: lists by layer of a long run would fill the memory


class Tail:
    """The lines of a growing JSON lines file. Only what is new is read, and a line only once it is whole."""

    def __init__(self, file: Path) -> None:
        self.file, self.rows = file, list[dict[str, Any]]()
        self._read = 0

    def look(self) -> None:
        """Read what is new. A file that has become shorter (a resumed run cuts it) is read anew."""
        if not self.file.is_file():
            return
        if self.file.stat().st_size < self._read:
            self._read = 0
            self.rows.clear()
        with self.file.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    self.rows.append({key: row[key] for key in KEPT if key in row})


def watch(run: Path, console: Console, every_s: float = 1.0) -> None:
    """Show ``run`` until it ends or Ctrl-C; once where the output is no terminal. Raises ConfigError: no such run."""
    if not run.is_dir():
        raise ConfigError(f"watch {run}: there is no such folder")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"watch {run}: not a run directory, it has no config.yaml; give the folder of a run")
    tail = Tail(run / "metrics.jsonl")
    tail.look()
    if not console.is_terminal:
        console.print(view(run, tail.rows))
        return
    began = (run / "summary.json").stat().st_mtime if (run / "summary.json").exists() else None
    with Live(view(run, tail.rows), console=console, auto_refresh=False) as live:
        while began is None and not (run / "summary.json").exists():
            time.sleep(every_s)
            tail.look()
            live.update(view(run, tail.rows), refresh=True)


def view(run: Path, rows: list[dict[str, Any]]) -> Group:
    """What the terminal shows: how far it is, the figures with their course, and the end of the log."""
    steps = total_steps(run)
    parts: list[Any] = [Text(str(run), style="bold")]
    if not rows:
        parts.append(Text("no whole line of metrics yet"))
    else:
        parts += [Text(progress(rows, steps)), figures(rows)]
    parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in log_end(run)]
    return Group(*parts)


def progress(rows: list[dict[str, Any]], steps: int) -> str:
    """Steps done, and how long the rest takes at the pace of the last lines."""
    done = rows[-1]["step"]
    times = [r["step_s"] for r in rows[-50:] if isinstance(r.get("step_s"), int | float)]
    text = f"step {done:,} of {steps:,} ({done / max(steps, 1):.0%}), {number(rows[-1].get('tokens', 0))} tokens"
    if times and steps > done:
        left = int((steps - done) * sum(times) / len(times))
        text += f", about {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} to go"
    return text


def figures(rows: list[dict[str, Any]]) -> Table:
    """A line per figure: its last value and its course."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, name in SHOWN.items():
        values = [float(r[key]) for r in rows if isinstance(r.get(key), int | float)]
        if values:
            table.add_row(name, f"{values[-1]:,.5g}", spark(values))
    return table


def spark(values: list[float]) -> str:
    """The course of ``values`` in at most WIDTH characters, from lowest to highest; ! where one is not finite."""
    size = -(-len(values) // WIDTH)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    good = [m for m in means if abs(m) < float("inf")]
    if not good:
        return "!" * len(means)
    low, span = min(good), max(good) - min(good) or 1.0
    return "".join(BARS[round((m - low) / span * 7)] if abs(m) < float("inf") else "!" for m in means)


def total_steps(run: Path) -> int:
    """``train.steps`` of the run; 0 where its config cannot be read."""
    try:
        return int(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return 0


def log_end(run: Path, lines: int = 4) -> list[str]:
    """The last lines of the run's log."""
    try:
        with (run / "log.txt").open("rb") as file:
            file.seek(max(0, (run / "log.txt").stat().st_size - 4000))
            return file.read().decode("utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
