"""A figure of ``metrics.jsonl``, read while the run writes it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Tail:
    """The values of figure ``name`` in ``run/metrics.jsonl``. A file that got shorter, by a resume, is read anew."""

    def __init__(self, run: Path, name: str) -> None:
        self._file = run / "metrics.jsonl"
        self._name = name
        self._place = 0
        self.values: dict[int, float] = {}  # step -> value
        self.names: set[str] = set()  # of all figures
        self.last: dict[str, Any] = {}  # line

    def read(self) -> list[tuple[int, float]]:
        """(step, value) of the whole lines since the last call, of steps that are new."""
        try:
            with self._file.open("rb") as file:
                if file.seek(0, 2) < self._place:
                    self._place = 0
                file.seek(self._place)
                data = file.read()
        except OSError:
            return []
        data = data[: data.rfind(b"\n") + 1]
        self._place += len(data)
        fresh = []
        for line in data.splitlines():
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, KeyError, TypeError):
                continue
            self.last = row
            self.names |= set(row)
            value = figure(row, self._name)
            if value is not None:
                if step not in self.values:
                    fresh.append((step, value))
                self.values[step] = value
        return fresh

    @property
    def value(self) -> float | None:
        """The value of the last step that has one."""
        return self.values[max(self.values)] if self.values else None


def figure(row: dict[str, Any], name: str) -> float | None:
    """The finite number called ``name``, "a/b" for one inside a mapping."""
    value: Any = row
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None
