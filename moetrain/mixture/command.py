"""``moetrain mixture``: from two sets of runs to a proposed mixture."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from moetrain.config.errors import ConfigError, DataError
from moetrain.config.presets import nearest
from moetrain.mixture.plot import check_plot, draw_plot
from moetrain.mixture.predictors import PREDICTORS
from moetrain.mixture.propose import DRAWS, Proposal, propose
from moetrain.mixture.runs import Runs, check_same, find_target, read_runs
from moetrain.mixture.study import AVERAGE, MEAN, fit_all, score

LEAST_FIT, LEAST_TEST = 10, 3

HELP = f"""usage: moetrain mixture fit=DIR test=DIR [key=value ...]

Learn from many small runs, each with its own mixture, how losses depend on the mixture; propose the mixture with
the lowest predicted loss, as settings for 'moetrain train'. docs/mixture.md tells more.

  fit=DIR          runs to learn from: a folder with a ..._mixture_... .csv and a ..._loss_... .csv (of several, those
                   that begin with train_), or fit=mixture.csv,loss.csv
  test=DIR         other runs, only to score the predictors on (of several files, those that begin with test_)
  target=COLUMN    the loss to make small; 'mean', the default: the mean of all
  predictor=NAME   what the proposal goes by: {", ".join(PREDICTORS)}
  rows=N           learn from N of the runs only, chosen at random
  cap=X            no domain gets more than X times its mean weight in the fit runs
  draws=N          mixtures that the search tries (default {DRAWS})
  seed=N           of everything random (default 0)
  plot=FILE        a picture of predicted and true losses, and of the mixture"""


@dataclass(frozen=True)
class Asked:
    """The words of the command line, as HELP explains them."""

    fit: str = ""
    test: str = ""
    target: str = MEAN
    predictor: str = "default"
    rows: int | None = None
    cap: float | None = None
    draws: int = DRAWS
    seed: int = 0
    plot: str = ""


def parse(words: Sequence[str]) -> Asked:
    """Read words like "fit=DIR". Raises ConfigError for one that is unknown, given twice, or has no such value."""
    known = [field.name for field in dataclasses.fields(Asked)]
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in known:
            raise ConfigError(f"mixture: there is no setting '{name}'; {nearest(name, known)}")
        if not equals or not value or name in given:
            raise ConfigError(
                f"mixture: {name} is " + ("given twice" if name in given else f"empty; give {name}=VALUE")
            )
        given[name] = value
    for name in ("fit", "test"):
        if name not in given:
            raise ConfigError(f"mixture: give {name}=DIR, a folder of runs; see 'moetrain mixture --help'")
    predictor = given.get("predictor", "default")
    if predictor not in PREDICTORS:
        raise ConfigError(f"no predictor is called '{predictor}'; {nearest(predictor, list(PREDICTORS))}")
    if "plot" in given:
        check_plot(given["plot"])
    return Asked(
        fit=given["fit"],
        test=given["test"],
        target=given.get("target", MEAN),
        predictor=predictor,
        rows=whole(given, "rows", LEAST_FIT) if "rows" in given else None,
        cap=read_cap(given["cap"]) if "cap" in given else None,
        draws=whole(given, "draws", 1000) if "draws" in given else DRAWS,
        seed=whole(given, "seed", 0) if "seed" in given else 0,
        plot=given.get("plot", ""),
    )


def whole(given: dict[str, str], name: str, least: int) -> int:
    """The whole number given to ``name``. Raises ConfigError."""
    value = given[name]
    if not (value.isascii() and value.isdigit()) or int(value) < least:
        raise ConfigError(f"{name} takes a whole number of {least} or more; got '{value}'")
    return int(value)


def read_cap(value: str) -> float:
    """A number above 1: with 1 only the prior itself would be left. Raises ConfigError."""
    if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) <= 1:
        raise ConfigError(f"cap takes a number above 1, how many times its prior a domain may get; got '{value}'")
    return float(value)


def read(asked: Asked) -> tuple[Runs, Runs]:
    """The fit runs (only ``asked.rows`` of them) and the test runs, with the same columns. Raises DataError."""
    fit = read_runs(asked.fit, "train")
    test = check_same(fit, read_runs(asked.test, "test"), asked.test)
    runs = len(fit.weights)
    for word, found, least in (("fit", runs, LEAST_FIT), ("test", len(test.weights), LEAST_TEST)):
        if found < least:
            raise DataError(f"{word}={getattr(asked, word)}: only {found} runs; at least {least} are needed")
    if asked.rows is not None:
        if asked.rows > runs:
            raise ConfigError(f"rows={asked.rows}: fit={asked.fit} has only {runs} runs")
        fit = fit.pick(np.sort(np.random.default_rng(asked.seed).choice(runs, asked.rows, replace=False)))
    return fit, test


def run(asked: Asked, console: Console) -> None:
    """Do it, and print tables, settings for 'moetrain train' and one line of JSON."""
    began = time.monotonic()
    fit, test = read(asked)
    target = find_target(asked.target, fit.targets)
    study = fit_all(fit, asked.seed)
    scores = score(study, test)
    console.print(score_table(scores, len(fit.weights), len(test.weights)))
    loss_of = study.loss_of(asked.predictor, target)
    found = propose(loss_of, fit.weights.mean(axis=0), asked.seed, asked.cap, asked.draws)
    console.print(mixture_table(fit.domains, found, target, asked.predictor))
    weights = rounded(found.weights)
    print("settings for 'moetrain train', for sources of these names:")
    print(" ".join(f"data.sources.{name}.weight={share:g}" for name, share in zip(fit.domains, weights, strict=True)))
    if asked.plot:
        true = test.losses.mean(axis=1) if target == MEAN else test.losses[:, test.targets.index(target)]
        title = f"{target}, by {asked.predictor}, from {len(fit.weights)} runs"
        draw_plot(asked.plot, title, loss_of(test.weights), true, fit.domains, found)
        print(f"plot: {asked.plot}")
    result = {
        "target": target,
        "predictor": asked.predictor,
        "fit_rows": len(fit.weights),
        "test_rows": len(test.weights),
        "spearman": scores,
        "weights": dict(zip(fit.domains, weights, strict=True)),
        "predicted_loss": found.loss,
        "predicted_loss_of_prior": found.prior_loss,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result))


def rounded(weights: np.ndarray) -> list[float]:
    """Weights to four decimals that still sum to 1: what rounding leaves goes to the largest."""
    units = np.rint(weights * 10_000).astype(int)
    units[np.argmax(units)] += 10_000 - units.sum()
    return [int(unit) / 10_000 for unit in units]


def score_table(scores: dict[str, dict[str, float | None]], fit_rows: int, test_rows: int) -> Table:
    """A row for each target, a column for each predictor."""
    table = Table(
        title=f"Spearman correlation x 100 on {test_rows} test runs, from {fit_rows} runs", title_justify="left"
    )
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
    return table


def mixture_table(domains: list[str], found: Proposal, target: str, predictor: str) -> Table:
    """The proposed weights beside the prior."""
    title = (
        f"proposed for {target} by {predictor}: loss {found.loss:.4f}; of the prior {found.prior_loss:.4f} (predicted)"
    )
    table = Table(title=title, title_justify="left")
    for name in ("domain", "prior (mean of fit runs)", "proposed"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, before, after in zip(domains, found.prior, found.weights, strict=True):
        table.add_row(domain, f"{before:.4f}", f"{after:.4f}")
    return table
