"""What ``moetrain mixture`` shows: tables, settings, a picture, and one line of JSON at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moetrain.mixture.plot import draw_plot
from moetrain.mixture.propose import Proposal
from moetrain.mixture.runs import Runs
from moetrain.mixture.shares import settings
from moetrain.mixture.study import AVERAGE, MEAN


def show_proposal(
    console: Console, names: Mapping[str, str], found: Proposal, target: str, predictor: str
) -> dict[str, float]:
    """Print the proposed mixture and the settings that ask for it; the rounded weights by domain. names: domain -> what
    sets its weight (``setting_names``)."""
    console.print(
        f"proposed for {target} by {predictor}: loss {found.loss:.4f}; of the prior {found.prior_loss:.4f} (predicted)"
    )
    console.print(mixture_table(list(names), found))
    weights = dict(zip(names, rounded(found.weights), strict=True))
    print("settings for 'moetrain train':")
    print(" ".join(settings(names, weights)))
    return weights


def show_plot(file: str, what: str, predicted_N: np.ndarray, runs: Runs, found: Proposal, target: str) -> None:
    """Draw ``file``. what: which predictor it is and where its predictions of ``runs`` come from."""
    draw_plot(file, f"{target}, by {what}", predicted_N, runs.of(target), runs.domains, found)
    print(f"plot: {file}")


def last_line(target: str, predictor: str, weights: dict[str, float], found: Proposal, **more: Any) -> None:
    """Print the line of JSON that ends the output."""
    result = {
        "target": target,
        "predictor": predictor,
        "weights": weights,
        "predicted_loss": found.loss,
        "predicted_loss_of_prior": found.prior_loss,
        **more,
    }
    print(json.dumps(result))


def rounded(weights: np.ndarray) -> list[float]:
    """Weights to six decimals, as settings and presets have them, that still sum to 1: what rounding leaves goes to the
    largest."""
    units = np.rint(weights * 1_000_000).astype(int)
    units[np.argmax(units)] += 1_000_000 - units.sum()
    return [int(unit) / 1_000_000 for unit in units]


def show_scores(console: Console, scores: dict[str, dict[str, float | None]], title: str) -> None:
    """Print a row for each target, a column for each predictor."""
    console.print(f"Spearman correlation x 100 {title}")  # the title of a table would be as narrow as the table
    table = Table()
    table.add_column("target")
    for name in scores:
        table.add_column(name, justify="right")
    targets = list(next(iter(scores.values())))
    labels = {AVERAGE: "average of the above", MEAN: "mean of the losses"}
    for target in targets:
        if target == AVERAGE:
            table.add_section()
        cells = (row[target] for row in scores.values())
        table.add_row(labels.get(target, target), *("-" if cell is None else f"{100 * cell:.2f}" for cell in cells))
    console.print(table)


def mixture_table(domains: list[str], found: Proposal) -> Table:
    """The proposed weights beside the prior."""
    table = Table()
    for name in ("domain", "prior", "proposed"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, before, after in zip(domains, found.prior, found.weights, strict=True):
        table.add_row(domain, f"{before:.4f}", f"{after:.4f}")
    return table
