"""`moetrain watch RUN`: a run in the terminal while it is written."""

from __future__ import annotations

import json
import time
from collections import deque
from functools import lru_cache
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
PACE = 50  # lines whose steps say how long the rest takes


class Course:
    """The course of one figure: its last value, and means of ``size`` values each, few enough to draw."""

    def __init__(self) -> None:
        self.last = 0.0
        self._means, self._size = list[float](), 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Take the next value."""
        self.last = value
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._size:
            self._means.append(self._sum / self._size)
            self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * WIDTH:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._size *= 2

    def means(self) -> list[float]:
        """Means of equally many values, but for the last; fewer than 2 WIDTH + 1."""
        return [*self._means, self._sum / self._count] if self._count else list(self._means)


class Tail:
    """What the view needs of a growing JSON lines file: the last line, the last ``step_s``, and the courses of what is
    SHOWN, by name. Only what is new is read, a line only once it is whole, and none is kept: there may be millions."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._begin()

    def _begin(self) -> None:
        self._read = 0
        self.last: dict[str, Any] = {}
        self.step_s: deque[float] = deque(maxlen=PACE)
        self.courses = {key: Course() for key in SHOWN}

    def look(self) -> None:
        """Read what is new. A file that has become shorter (a resumed run cuts it) is read anew."""
        if not self.file.is_file():
            return
        if self.file.stat().st_size < self._read:
            self._begin()
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
                    self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        self.last = row
        if isinstance(row.get("step_s"), int | float):
            self.step_s.append(row["step_s"])
        for key, course in self.courses.items():
            if isinstance(row.get(key), int | float):
                course.add(float(row[key]))


def watch(run: Path, console: Console, every_s: float = 1.0) -> None:
    """Show ``run`` until it ends or Ctrl-C; once where the output is no terminal. Raises ConfigError: no such run."""
    if not run.is_dir():
        raise ConfigError(f"watch {run}: there is no such folder")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"watch {run}: not a run directory, it has no config.yaml; give the folder of a run")
    tail = Tail(run / "metrics.jsonl")
    tail.look()
    if not console.is_terminal:
        console.print(view(run, tail))
        return
    began = (run / "summary.json").stat().st_mtime if (run / "summary.json").exists() else None
    with Live(view(run, tail), console=console, auto_refresh=False) as live:
        while began is None and not (run / "summary.json").exists():
            time.sleep(every_s)
            tail.look()
            live.update(view(run, tail), refresh=True)


def view(run: Path, tail: Tail) -> Group:
    """What the terminal shows: how far it is, the figures with their course, and the end of the log."""
    parts: list[Any] = [Text(str(run), style="bold")]
    if not tail.last:
        parts.append(Text("no whole line of metrics yet"))
    else:
        config = run / "config.yaml"
        steps = total_steps(config, config.stat().st_mtime_ns) if config.is_file() else 0
        parts += [Text(progress(tail, steps)), figures(tail.courses)]
    parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in log_end(run)]
    return Group(*parts)


def progress(tail: Tail, steps: int) -> str:
    """Steps done, and how long the rest takes at the pace of the last lines."""
    done, times = tail.last["step"], tail.step_s
    text = f"step {done:,} of {steps:,} ({done / max(steps, 1):.0%}), {number(tail.last.get('tokens', 0))} tokens"
    if times and steps > done:
        left = int((steps - done) * sum(times) / len(times))
        text += f", about {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} to go"
    return text


def figures(courses: dict[str, Course]) -> Table:
    """A line per figure: its last value and its course."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, name in SHOWN.items():
        if means := courses[key].means():
            table.add_row(name, f"{courses[key].last:,.5g}", spark(means))
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


@lru_cache(maxsize=1)
def total_steps(config: Path, written_ns: int) -> int:
    """``train.steps`` of the run; 0 where its config, last written at ``written_ns``, cannot be read."""
    try:
        return int(yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["steps"])
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
