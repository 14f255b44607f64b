"""A picture of how well the loss is predicted, and of the proposed mixture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moetrain.config.errors import ConfigError
from moetrain.mixture.extra import need
from moetrain.mixture.propose import Proposal


def check_plot(file: str) -> None:
    """Refuse a plot that could not be written, before time is spent. Raises ConfigError."""
    path = Path(file)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"plot={file}: give a name that ends in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ConfigError(f"plot={file}: there is no folder {path.parent}")
    need("matplotlib.figure")


def draw_plot(
    file: str, title: str, predicted_N: np.ndarray, true_N: np.ndarray, domains: list[str], found: Proposal
) -> None:
    """Write ``file``: predicted against true losses of runs; proposed weights beside the prior."""
    figure = need("matplotlib.figure").Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(true_N, predicted_N, s=8)
    ends = [min(true_N.min(), predicted_N.min()), max(true_N.max(), predicted_N.max())]
    left.plot(ends, ends, color="grey", linewidth=1)
    left.set(xlabel="true loss", ylabel="predicted loss", title=title)
    rows = np.arange(len(domains))
    right.barh(rows - 0.2, found.prior, height=0.4, label=f"prior: predicted {found.prior_loss:.4f}")
    right.barh(rows + 0.2, found.weights, height=0.4, label=f"proposed: predicted {found.loss:.4f}")
    right.set_yticks(rows, domains)
    right.invert_yaxis()
    right.set(xlabel="weight", title="mixture")
    right.legend()
    figure.savefig(file, dpi=120)
