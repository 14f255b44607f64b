"""Small runs to learn from: pairs of CSV files in the layout of the published RegMix runs (arXiv 2407.01492).

A mixture file has a column ``index`` and one column of weights per domain; a loss file has ``index`` and one column per
target. Rows belong together by their index, in any order.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetrain.config.errors import ConfigError, DataError
from moetrain.config.presets import nearest

# The published weights are rounded to 0.001 and sum to 0.996 ... 1.003. A sum further off is a mistake.
SUM_SLACK = 0.05
LEAST_FIT, LEAST_TEST = 10, 3


@dataclass(frozen=True)
class Runs:
    """N runs over D domains, measured on M targets.

    weights: (N, D), each row sums to 1. losses: (N, M). Names are short: ``train_the_pile_arxiv`` is the domain
    ``the_pile_arxiv``, ``metric/the_pile_arxiv_val_loss`` the target ``the_pile_arxiv``.
    """

    domains: list[str]
    targets: list[str]
    weights: np.ndarray
    losses: np.ndarray

    def of(self, target: str) -> np.ndarray:
        """(N,) losses on one target, or of "mean" their mean."""
        return self.losses.mean(axis=1) if target == "mean" else self.losses[:, self.targets.index(target)]

    def pick(self, rows: np.ndarray) -> Runs:
        """Only these rows: numbers, or a mask."""
        return Runs(self.domains, self.targets, self.weights[rows], self.losses[rows])


@dataclass(frozen=True)
class Sheet:
    """A CSV file. rows: index -> (line number, values of the columns)."""

    file: Path
    columns: list[str]
    rows: dict[str, tuple[int, list[float]]]


def read_runs(where: str, part: str) -> Runs:
    """The runs at ``where`` for ``part`` ("train" to fit on, "test").

    ``where`` is a folder or "mixture.csv,loss.csv". Raises DataError that names the file and the line.
    """
    mixture_file, loss_file = find_pair(where, part)
    mixtures, losses = read_sheet(mixture_file), read_sheet(loss_file)
    for one, other in ((mixtures, losses), (losses, mixtures)):
        for index, (line, _) in one.rows.items():
            if index not in other.rows:
                raise DataError(
                    f"{one.file} line {line}: index {index} is not in {other.file}; add it or delete this row"
                )
    weights = np.array([check_weights(mixtures, index) for index in mixtures.rows])
    return Runs(
        domains=short_names(mixtures, "train_", ""),
        targets=short_names(losses, "metric/", "_val_loss"),
        weights=weights / weights.sum(axis=1, keepdims=True),
        losses=np.array([losses.rows[index][1] for index in mixtures.rows]),
    )


def find_pair(where: str, part: str) -> tuple[Path, Path]:
    """The mixture file and the loss file at ``where``; in a folder with several, those that begin with ``part``_."""
    word = "fit" if part == "train" else "test"
    if "," in where:
        names = where.split(",")
        if len(names) != 2:
            raise ConfigError(f"{word}={where}: give two files, mixture.csv,loss.csv, or a folder")
        for name in names:
            if not Path(name).is_file():
                raise DataError(f"{word}={where}: there is no file {name}")
        return Path(names[0]), Path(names[1])
    folder = Path(where)
    if not folder.is_dir():
        raise DataError(f"{word}={where}: there is no such folder; give a folder, or two files as mixture.csv,loss.csv")
    found = []
    for kind in ("mixture", "loss"):
        files = sorted(file for file in folder.glob("*.csv") if kind in file.name)
        if len(files) > 1:
            files = [file for file in files if file.name.startswith(f"{part}_")]
        if len(files) != 1:
            names_found = ", ".join(file.name for file in files) or "none"
            raise DataError(
                f"{word}={where}: needs one {part}_..._{kind}_... .csv file, found {names_found}; "
                f"name the two files, {word}=mixture.csv,loss.csv"
            )
        found.append(files[0])
    return found[0], found[1]


def read_sheet(file: Path) -> Sheet:
    """Read one CSV file. Raises DataError for one that has no index, no rows, or a cell that is not a finite number."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = [(number, cells) for number, cells in enumerate(csv.reader(stream), 1) if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a CSV file in UTF-8 ({error})") from error
    header = [name.strip() for name in lines[0][1]] if lines else []
    if "index" not in header:
        raise DataError(f"{file} line 1: no column is called 'index'; the first line names the columns")
    columns = [name for name in header if name != "index"]
    if not columns or len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise DataError(
            f"{file} line 1: " + (f"column {twice[0]} is there twice" if twice else "only the column 'index'")
        )
    at = header.index("index")
    rows: dict[str, tuple[int, list[float]]] = {}
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(f"{file} line {number}: {len(cells)} cells under {len(header)} columns; complete the row")
        index = cells.pop(at).strip()
        if index in rows:
            raise DataError(f"{file} line {number}: index {index} is on line {rows[index][0]} too; delete one")
        values = [read_number(file, number, name, cell) for name, cell in zip(columns, cells, strict=True)]
        rows[index] = (number, values)
    if not rows:
        raise DataError(f"{file}: has no rows below its header")
    return Sheet(file, columns, rows)


def read_number(file: Path, line: int, column: str, cell: str) -> float:
    """A finite number. Raises DataError."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{file} line {line}: {column} is '{cell}', not a finite number; delete that run from both files"
        )
    return value


def check_weights(mixtures: Sheet, index: str) -> list[float]:
    """The weights of one run. Raises DataError where one is negative or their sum is not near 1."""
    line, weights = mixtures.rows[index]
    for name, weight in zip(mixtures.columns, weights, strict=True):
        if weight < 0:
            raise DataError(f"{mixtures.file} line {line}: {name} is {weight:g}; a weight is a share, 0 or more")
    if abs(sum(weights) - 1) > SUM_SLACK:
        raise DataError(f"{mixtures.file} line {line}: the weights sum to {sum(weights):g}; give shares that sum to 1")
    return weights


def short_names(sheet: Sheet, start: str, end: str) -> list[str]:
    """The columns without ``start`` and ``end``. Raises DataError where two become the same."""
    names = [name.removeprefix(start).removesuffix(end) for name in sheet.columns]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{sheet.file} line 1: two columns are both called '{name}' in short; rename one")
    return names


def check_same(fit: Runs, test: Runs, where: str) -> Runs:
    """``test`` with its columns in the order of ``fit``. Raises DataError where the two have other columns."""
    for kind, ours, theirs in (("domain", fit.domains, test.domains), ("target", fit.targets, test.targets)):
        odd = sorted(set(ours) ^ set(theirs))
        if odd:
            side = "fit" if odd[0] in ours else "test"
            raise DataError(f"test={where}: {kind} '{odd[0]}' is only in the {side} runs; both need the same columns")
    domains = [test.domains.index(name) for name in fit.domains]
    targets = [test.targets.index(name) for name in fit.targets]
    return Runs(fit.domains, fit.targets, test.weights[:, domains], test.losses[:, targets])


def find_target(word: str, targets: list[str]) -> str:
    """The target that ``word`` means: its column, its short name, or the only one that ends so. Raises ConfigError."""
    short = word.removeprefix("metric/").removesuffix("_val_loss")
    ends = [name for name in targets if name == short] or [name for name in targets if name.endswith(f"_{short}")]
    if word == "mean" or len(ends) == 1:
        return "mean" if word == "mean" else ends[0]
    if len(ends) > 1:
        raise ConfigError(f"target={word} may mean {' or '.join(ends)}; give the whole name")
    raise ConfigError(f"no target is called '{word}'; {nearest(word, [*targets, 'mean'])}")


def write_runs(folder: Path, runs: Runs) -> None:
    """Write ``runs`` as train_mixture.csv and train_loss.csv, whole or not at all, in the layout of ``read_runs``."""
    losses = [f"metric/{name}_val_loss" for name in runs.targets]
    write_sheet(folder / "train_mixture.csv", [f"train_{name}" for name in runs.domains], runs.weights)
    write_sheet(folder / "train_loss.csv", losses, runs.losses)


def write_sheet(file: Path, columns: list[str], values: np.ndarray) -> None:
    """Write one CSV file with an index from 1."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["index", *columns])
        writer.writerows([number, *(f"{value:.6g}" for value in row)] for number, row in enumerate(values, 1))
    temporary.replace(file)
