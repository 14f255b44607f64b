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

import numpy as np
from published import Row, predictions, rows_of
from scipy.optimize import least_squares

from moetrain.planner.rates import FITTED, Constants

FREE = ("product_16", "product_8", "grouped", "attention", "start", "passes", "fused_passes", "quantise", "host",
        "graphs", "bulk",
        "hidden", "reduce", "natural")  # fmt: skip
PRIOR = 0.3  # standard deviation of a constant's logarithm before any row is seen
NOISE = 0.12  # of a row's: releases of one framework differ by as much
MOST = {
    "product_16": 0.95,
    "product_8": 0.95,
    "grouped": 1.0,
    "attention": 0.9,
    "hidden": 0.98,
    "bulk": 1.0,
    "graphs": 1.0,
}


def with_values(x: Sequence[float]) -> Constants:
    """Constants at the logarithms ``x``."""
    values = {name: min(float(np.exp(v)), MOST.get(name, np.inf)) for name, v in zip(FREE, x, strict=True)}
    return dataclasses.replace(Constants(), **values)


def fit(rows: Sequence[Row], start: Sequence[float] | None = None, steps: int = 6) -> Constants:
    """The constants that explain ``rows``."""
    centre = np.log([getattr(Constants(), name) for name in FREE])
    unique: dict[str, list[Row]] = {}
    for row in rows:
        unique.setdefault(repr((row.setting, row.row)), []).append(row)
    firsts = [group[0] for group in unique.values()]
    told = np.array([np.mean(np.log([r.tokens for r in group])) for group in unique.values()])
    weight = np.sqrt([min(len(group), 3) for group in unique.values()])

    def residuals(x: np.ndarray) -> np.ndarray:
        error = (np.log(predictions(firsts, with_values(x))) - told) / NOISE * weight
        return np.concatenate([np.sign(error) * np.sqrt(2 * (np.sqrt(1 + error**2) - 1)), (x - centre) / PRIOR])

    found = least_squares(residuals, centre if start is None else start, diff_step=0.02, max_nfev=steps)
    return with_values(found.x)


def logs(c: Constants) -> np.ndarray:
    """Where a fit can start from."""
    return np.log([getattr(c, name) for name in FREE])


def errors(rows: Sequence[Row], c: Constants) -> np.ndarray:
    """Predicted over told, less 1."""
    return predictions(rows, c) / np.array([row.tokens for row in rows]) - 1


def jacobian(rows: Sequence[Row], c: Constants) -> tuple[np.ndarray, np.ndarray]:
    """(logarithms of the predictions, their derivatives in the logarithms of the constants)."""
    x = logs(c)
    base = np.log(predictions(rows, c))
    columns = []
    for i in range(len(FREE)):
        moved = x.copy()
        moved[i] -= 0.02
        columns.append((base - np.log(predictions(rows, with_values(moved)))) / 0.02)
    return base, np.array(columns).T


def cross_validated(rows: list[Row], whole: Constants, by: str, base: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Errors of each row under constants fitted without any row of the same model ("model") or GPU ("gpu"): the
    robust fit is done again on the other rows, with the model made linear around the fit of all."""
    told = np.log([row.tokens for row in rows])
    keys = np.array([getattr(row, by) for row in rows])
    x, centre = logs(whole), logs(Constants())
    found = np.zeros(len(rows))
    for key in sorted(set(keys)):
        out = keys == key
        d = np.zeros(len(x))
        for _ in range(30):
            error = (base + slopes @ d - told)[~out] / NOISE
            w = 1 / np.sqrt(1 + error**2) / NOISE**2
            left = slopes[~out].T @ (w[:, None] * slopes[~out]) + np.eye(len(x)) / PRIOR**2
            right = -slopes[~out].T @ (w * (base - told)[~out]) - (x - centre) / PRIOR**2
            d = np.clip(np.linalg.solve(left, right), -0.5, 0.5)
        inside = [row for row, is_out in zip(rows, out, strict=True) if is_out]
        found[out] = errors(inside, with_values(x + d))
        median = np.median(np.abs(found[out]))
        print(f"  without {by} {key:20s} {len(inside):4d} rows, median error {median:6.1%}", flush=True)
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
    whole = FITTED if args.check else fit(rows)
    found = errors(rows, whole)
    show("all rows seen" if not args.check else "constants of moetrain", found)
    crossed = found
    if not args.no_cross:
        made = jacobian(rows, whole)
        by_model, by_gpu = (cross_validated(rows, whole, by, *made) for by in ("model", "gpu"))
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
    print(json.dumps({name: float(f"{getattr(whole, name):.4g}") for name in FREE}))


if __name__ == "__main__":
    main()
