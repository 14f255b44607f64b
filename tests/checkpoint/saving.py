"""States that tell their step, and what a folder of checkpoints must then hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint import load


def state(step: int, mark: int = 0) -> dict[str, Any]:
    """A state whose every number depends on ``step`` and ``mark``."""
    generator = torch.Generator().manual_seed(1000 * step + mark)
    weights: dict[str, Tensor] = {f"w{i}": torch.randn(40, 25, generator=generator) for i in range(4)}
    return {
        "model": weights,
        "optim": {"state.w0.step": torch.tensor(float(step))},
        "train": {"step": step, "mark": mark},
    }


def assert_holds(path: Path) -> tuple[int, int]:
    """Checkpoint ``path`` loads, bit for bit what was saved as the step of its name; (step, mark)."""
    found = state(0)
    load(path, found)
    step, mark = found["train"]["step"], found["train"]["mark"]
    assert path.name == f"step-{step}"
    expected = state(step, mark)
    for section in ("model", "optim"):
        for name, value in expected[section].items():
            assert torch.equal(found[section][name], value), name
    return step, mark


class Lines(logging.Handler):
    """Log lines of "moetrain" from INFO up, also in a forked rank: ``with Lines() as lines``."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname} {record.getMessage()}")

    def __enter__(self) -> list[str]:
        logging.getLogger("moetrain").setLevel(logging.INFO)
        logging.getLogger("moetrain").addHandler(self)
        return self.texts

    def __exit__(self, *_: object) -> None:
        logging.getLogger("moetrain").removeHandler(self)
