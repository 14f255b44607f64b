"""Fit the constants of the planner's time model to published speeds, and say how well it predicts what it has not seen.

    python scripts/fit_planner.py ROWS.csv            # cross-validated errors, the worst rows, the constants
    python scripts/fit_planner.py ROWS.csv --check     # the same with the constants that moetrain has
    python scripts/fit_planner.py ROWS.csv --check --no-cross --rows   # every row, predicted beside told

ROWS.csv has the columns of published_perf.csv (docs/plan.md says which). Least squares on the logarithm of tokens per
second and GPU, robust against rows that no model explains; each constant is held near the value that a measurement of a
single operation suggests (``planner.rates``), by a prior of a third either way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from published import Row, predictions, rows_of

from moetrain.planner.rates import FITTED, Constants

FREE = ("product_16", "product_8", "grouped", "attention", "start", "passes", "fused_passes", "quantise", "host",
        "bulk", "hidden", "reduce", "natural")  # fmt: skip
# Standard deviation of a constant's logarithm before any row is seen: narrow where kernels were measured by themselves.
PRIOR = np.array(
    [{"product_16": 0.1, "product_8": 0.1, "grouped": 0.1, "attention": 0.15}.get(name, 0.3) for name in FREE]
)
STEP = 0.02  # of a logarithm, for derivatives
NOISE = 0.12  # of a row's: releases of one framework differ by as much
MOST = {
    "product_16": 1.0,
    "product_8": 1.0,
    "grouped": 1.0,
    "attention": 1.0,
    "hidden": 0.98,
    "bulk": 1.0,
}


def with_values(x: np.ndarray) -> Constants:
    """Constants at the logarithms ``x``, an array (constants,) or, for as many sets of them, (constants, sets)."""
    found: dict[str, Any] = {
        name: np.minimum(np.exp(v), MOST.get(name, np.inf)) for name, v in zip(FREE, x, strict=True)
    }
    return dataclasses.replace(Constants(), **found)


def logs(c: Constants) -> np.ndarray:
    """The inverse of ``with_values``."""
    return np.log([getattr(c, name) for name in FREE])


@dataclasses.dataclass(frozen=True)
class Runs:
    """Rows, those that tell of the same run put together. told: mean logarithm of tokens per second. weight: how many
    rows, 3 at most, as releases that repeat a number say little more."""

    rows: list[Row]
    told: np.ndarray
    weight: np.ndarray

    def take(self, where: np.ndarray) -> Runs:
        """Those that are true in ``where``."""
        kept = [row for row, is_kept in zip(self.rows, where, strict=True) if is_kept]
        return Runs(kept, self.told[where], self.weight[where])

    def near(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(logarithms of the predictions at ``x``, their derivatives in ``x``), priced all at once."""
        sets = np.repeat(x[:, None], len(x) + 1, axis=1)
        sets[np.arange(len(x)), np.arange(len(x)) + 1] -= STEP
        found = np.log(predictions(self.rows, with_values(sets), len(x) + 1))
        return found[:, 0], (found[:, :1] - found[:, 1:]) / STEP


def together(rows: Sequence[Row]) -> Runs:
    """``rows`` as Runs."""
    unique: dict[str, list[Row]] = {}
    for row in rows:
        unique.setdefault(repr((row.setting, row.row)), []).append(row)
    groups = list(unique.values())
    told = np.array([np.mean(np.log([r.tokens for r in group])) for group in groups])
    return Runs([group[0] for group in groups], told, np.array([min(len(group), 3.0) for group in groups]))


def moved(runs: Runs, x: np.ndarray, base: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Where the robust fit ends when the model is taken as linear around ``x``: constants may move by half."""
    centre, d = logs(Constants()), np.zeros(len(x))
    for _ in range(30):
        error = (base + slopes @ d - runs.told) / NOISE
        w = runs.weight / (1 + error**2) ** 0.5 / NOISE**2
        left = slopes.T @ (w[:, None] * slopes) + np.diag(1 / PRIOR**2)
        right = -slopes.T @ (w * (base - runs.told)) - (x - centre) / PRIOR**2
        d = np.clip(np.linalg.solve(left, right), -0.5, 0.5)
    return x + d


def fit(runs: Runs, steps: int = 5) -> np.ndarray:
    """The constants, as logarithms, that explain ``runs``."""
    x = logs(FITTED)
    for _ in range(steps):
        x = within(moved(runs, x, *runs.near(x)))
    return x


def within(x: np.ndarray) -> np.ndarray:
    """``x`` no higher than MOST."""
    return np.minimum(x, np.log([MOST.get(name, np.inf) for name in FREE]))


def errors(rows: Sequence[Row], c: Constants) -> np.ndarray:
    """Predicted over told, less 1."""
    return predictions(rows, c)[:, 0] / np.array([row.tokens for row in rows]) - 1


def cross_validated(rows: list[Row], whole: np.ndarray, by: str) -> np.ndarray:
    """Errors of each row under constants fitted without any row of the same model ("model") or GPU ("gpu"), by two
    steps of the same fit from where that of all rows ended."""
    keys = np.array([getattr(row, by) for row in rows])
    found, runs = np.zeros(len(rows)), together(rows)
    base, slopes = runs.near(whole)
    of_run = np.array([getattr(row, by) for row in runs.rows])
    for key in sorted(set(keys)):
        kept = of_run != key
        others = runs.take(kept)
        x = within(moved(others, whole, base[kept], slopes[kept]))
        x = within(moved(others, x, *others.near(x)))
        out = keys == key
        found[out] = errors([row for row, is_out in zip(rows, out, strict=True) if is_out], with_values(x))
        bias, median = np.median(found[out]), np.median(np.abs(found[out]))
        print(
            f"  without {by} {key:20s} {out.sum():4d} rows, median error {median:6.1%}, signed {bias:+6.1%}", flush=True
        )
    return found


def show(name: str, found: np.ndarray) -> None:
    """One line."""
    size = np.abs(found)
    print(
        f"{name}: median {np.median(size):.1%}, mean {size.mean():.1%}, within 15%: {np.mean(size < 0.15):.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="ROWS.csv")
    parser.add_argument("--check", action="store_true", help="no fit: the constants that moetrain has")
    parser.add_argument("--no-cross", action="store_true", help="no cross-validation")
    parser.add_argument("--rows", dest="rows_too", action="store_true", help="every row, predicted beside told")
    args = parser.parse_args()
    rows = list(rows_of(args.file))
    print(f"{len(rows)} rows of {len({r.model for r in rows})} models on {len({r.gpu for r in rows})} GPUs")
    whole = logs(FITTED) if args.check else fit(together(rows))
    found = crossed = errors(rows, with_values(whole))
    show("all rows seen" if not args.check else "constants of moetrain", found)
    if not args.no_cross:
        by_model, by_gpu = (cross_validated(rows, whole, by) for by in ("model", "gpu"))
        show("leaving out each model", by_model)
        show("leaving out each GPU", by_gpu)
        crossed = by_model
    if args.rows_too:
        for r, error in zip(rows, found, strict=True):
            d = r.row
            sizes = " ".join(f"{k}{d[k]}" for k in ("pp", "vpp", "tp", "cp", "ep", "etp", "micro_batch"))
            told = f"told {r.tokens:8.0f} predicted {r.tokens * (1 + error):8.0f} {error:+6.1%}"
            print(f"  line {r.number:3d} {told} {r.model}, {r.gpu}, {r.setting.stack.name}, {d['precision']}, {sizes}")
    print("worst rows:")
    for i in np.argsort(-np.abs(crossed))[:10]:
        r = rows[i]
        where = f"{r.model}, {r.gpu}, {r.setting.stack.name}: {r.text[:60]} ... {r.text[-60:]}"
        print(f"  line {r.number:3d} {crossed[i]:+7.1%} told {r.tokens:8.0f} {where}")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in zip(FREE, np.exp(whole), strict=True)}))


if __name__ == "__main__":
    main()
