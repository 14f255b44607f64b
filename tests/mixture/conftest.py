"""Made-up runs of a known law, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

DOMAINS = ["web", "code", "books", "talk"]
# loss of target = c + exp(t . x): each domain lowers its own loss most, so the best mixture for the mean is inside
CONSTANTS = np.array([2.0, 1.5, 2.5])
T_DM = np.array([[-2.0, 0.6, 0.2], [0.5, -3.0, 0.9], [0.1, 0.8, -2.0], [0.4, 0.5, 0.6]])


def true_losses(x_ND: np.ndarray) -> np.ndarray:
    """(N, 3) losses of mixtures of four domains."""
    return CONSTANTS + np.exp(x_ND @ T_DM)


def mixtures(rows: int, seed: int, domains: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(domains, 0.7), rows)


def write(file: Path, columns: list[str], values: np.ndarray) -> None:
    lines = [",".join(["index", *columns])]
    lines += [",".join([str(i + 1), *(f"{value:.6f}" for value in row)]) for i, row in enumerate(values)]
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 fit runs and 30 test runs in one folder, in the published layout."""
    for part, rows, seed in (("train", 40, 0), ("test", 30, 1)):
        x = mixtures(rows, seed)
        write(tmp_path / f"{part}_mixture_1m.csv", [f"train_{name}" for name in DOMAINS], x)
        targets = [f"metric/{name}_val_loss" for name in DOMAINS[:3]]
        write(tmp_path / f"{part}_pile_loss_1m.csv", targets, true_losses(x))
    return tmp_path
