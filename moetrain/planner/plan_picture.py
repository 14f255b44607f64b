"""One picture of a plan: where time and memory of the best mappings go, and what speed a given memory buys."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.errors import ConfigError
from moetrain.planner.footprint import PARTS
from moetrain.planner.search import Found, Problem
from moetrain.planner.step_time import SPLIT


def check_picture(file: Path) -> None:
    """Raise ConfigError where it could not be drawn, before time is spent."""
    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot {file}: give a name that ends in .png, .pdf or .svg")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot {file}: there is no folder {file.absolute().parent}")
    _figure()


def _figure() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'moetrain[plan]'") from None


def draw(file: Path, p: Problem, found: Found) -> None:
    """Write ``file``."""
    figure = _figure().Figure(figsize=(15, 5), layout="constrained")
    time, memory, frontier = figure.subplots(1, 3)
    places = np.arange(len(found.best))
    bottom = np.zeros(len(found.best))
    for name in SPLIT:
        size = np.array([plan.parts[name] for plan in found.best])
        if size.max() > 0.002 * found.best[0].seconds:
            time.bar(places, size, bottom=bottom, label=name)
            bottom += size
    time.set(title=f"{p.cfg.model.name} on {p.world} {p.cluster.name}: time of a step", ylabel="seconds")
    bottom = np.zeros(len(found.best))
    for name in PARTS:
        size = np.array([plan.memory[name] for plan in found.best]) / 2**30
        if size.max() > 0.01:
            memory.bar(places, size, bottom=bottom, label=name)
            bottom += size
    memory.axhline(p.capacity / 2**30, color="black", linestyle="--", label="what fits")
    memory.set(title="memory of the fullest rank", ylabel="GiB")
    for axes in (time, memory):
        axes.set_xticks(places, [str(i + 1) for i in places])
        axes.set_xlabel("mapping, best first")
        axes.legend(fontsize=7)
    held, speed = (np.array(x) for x in zip(*found.frontier, strict=True))
    frontier.step(held / 2**30, speed, where="post", marker=".")
    frontier.set(title="the most speed for a memory", xlabel="GiB", ylabel="tokens/s/GPU")
    figure.savefig(file)
