"""One picture of a plan: where time and memory of the best mappings go, and what speed a given memory buys."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.errors import ConfigError
from moetrain.planner.footprint import PARTS
from moetrain.planner.search import Found, Problem, description
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
    figure = _figure().Figure(figsize=(17, 6), layout="constrained")
    time, memory, frontier = figure.subplots(1, 3)
    _stack(time, {name: np.array([plan.parts[name] for plan in found.best]) for name in SPLIT})
    time.set(title=f"{p.cfg.model.name} on {p.world} {p.cluster.name}: time of a step", ylabel="seconds")
    held_there = [on_device(plan.memory) for plan in found.best]
    _stack(memory, {name: np.array([parts[name] for parts in held_there]) / 2**30 for name in PARTS})
    memory.axhline(p.capacity / 2**30, color="black", linestyle="--", label="what fits")
    memory.set(title="memory of the fullest rank", ylabel="GiB")
    for axes in (time, memory):
        axes.set_xticks(range(len(found.best)), [str(i + 1) for i in range(len(found.best))])
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], names[::-1], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    held, speed = (np.array(x) for x in zip(*found.frontier, strict=True))
    frontier.step(held / 2**30, speed, where="post", marker=".")
    frontier.set(title="the most speed for a memory", xlabel="GiB", ylabel="tokens/s/GPU")
    lines = [f"{i + 1}: {description(plan.row)}" for i, plan in enumerate(found.best)]
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left", family="monospace")
    figure.savefig(file)


def on_device(memory: dict[str, float]) -> dict[str, float]:
    """The parts of a plan's memory without what is in the host's: the optimizer's state, or all of the state."""
    found, left = dict(memory), memory["host"]
    for name in ("optimizer", "gradients", "weights"):
        found[name] -= min(left, memory[name])
        left -= memory[name] - found[name]
    return found


def _stack(axes: Any, parts: dict[str, Any]) -> None:
    """A bar for each mapping, its parts on each other; those that nobody could see are left out."""
    most = sum(parts.values()).max()
    colours = importlib.import_module("matplotlib").colormaps["tab20"].colors
    bottom = np.zeros(len(next(iter(parts.values()))))
    for place, (name, size) in enumerate(parts.items()):
        if size.max() > 0.002 * most:
            # the strong ones of the map's pairs first
            axes.bar(range(len(size)), size, bottom=bottom, label=name, color=colours[(2 * place) % 20 + place // 10])
            bottom = bottom + size
