"""``moetrain mixture``: from its words to what they ask for; ``fit=`` and ``collect=`` are done here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import numpy as np
from rich.console import Console

from moetrain.config.errors import ConfigError, DataError
from moetrain.mixture.propose import propose
from moetrain.mixture.report import last_line, show_plot, show_proposal, show_scores
from moetrain.mixture.runs import LEAST_FIT, LEAST_TEST, Runs, check_same, find_target, read_runs, write_runs
from moetrain.mixture.study import cross_validated, fit_all, predictions, score
from moetrain.mixture.words import Asked


def run(asked: Asked, config_dirs: Sequence[str], console: Console) -> None:
    """Do what ``asked`` says. config_dirs: folders of further presets, for its settings."""
    if config_dirs and asked.verb not in ("search", "cluster"):
        raise ConfigError(f"--config-dir does not go with {asked.verb}=")
    if asked.verb == "fit":
        fit(asked, console)
    elif asked.verb == "collect":
        collect(asked)
    elif asked.verb == "search":
        from moetrain.mixture.search_command import search  # imports torch

        search(asked, config_dirs, console)
    else:
        from moetrain.mixture.cluster_command import cluster

        cluster(asked, config_dirs)


def collect(asked: Asked) -> None:
    """Write the CSV files of a sweep into its folder."""
    from moetrain.mixture.collect import collect as collect_sweep

    folder = Path(asked.where)
    runs = collect_sweep(folder)
    write_runs(folder, runs)
    print(f"{len(runs.weights)} runs of {len(runs.domains)} domains: {folder}/train_mixture.csv, train_loss.csv")
    print(f"next: moetrain mixture {quote(f'fit={folder}')}")


def fit(asked: Asked, console: Console) -> None:
    """Fit all predictors, score them, propose a mixture."""
    began = time.monotonic()
    runs, test = read(asked)
    target = find_target(asked.target, runs.targets)
    study = fit_all(runs, asked.seed)
    if test is None:
        shown, predicted = runs, cross_validated(runs, asked.seed)
        title = f"on {len(runs.weights)} runs, each predicted from others (cross-validation)"
    else:
        shown, predicted = test, predictions(study, test.weights)
        title = f"on {len(test.weights)} test runs, from {len(runs.weights)} runs"
    scores = score(predicted, shown)
    show_scores(console, scores, title)
    loss_of = study.loss_of(asked.predictor, target)
    found = propose(loss_of, runs.weights.mean(axis=0), asked.seed, asked.cap, asked.draws)
    weights = show_proposal(
        console, {name: f"data.sources.{name}" for name in runs.domains}, found, target, asked.predictor
    )
    if asked.plot:
        mine = Runs(runs.domains, runs.targets, shown.weights, predicted[asked.predictor])
        show_plot(asked.plot, f"{asked.predictor}, {title}", mine.of(target), shown, found, target)
    last_line(
        target, asked.predictor, weights, found, fit_rows=len(runs.weights),
        test_rows=0 if test is None else len(test.weights), spearman=scores, seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip


def read(asked: Asked) -> tuple[Runs, Runs | None]:
    """The fit runs (only ``asked.rows`` of them) and the test runs, with the same columns. Raises DataError."""
    runs = read_runs(asked.where, "train")
    test = check_same(runs, read_runs(asked.test, "test"), asked.test) if asked.test else None
    found = len(runs.weights)
    if found < LEAST_FIT:
        raise DataError(f"fit={asked.where}: only {found} runs; at least {LEAST_FIT} are needed")
    if test is not None and len(test.weights) < LEAST_TEST:
        raise DataError(f"test={asked.test}: only {len(test.weights)} runs; at least {LEAST_TEST} are needed")
    if asked.rows is not None:
        if asked.rows > found:
            raise ConfigError(f"rows={asked.rows}: fit={asked.where} has only {found} runs")
        runs = runs.pick(np.sort(np.random.default_rng(asked.seed).choice(found, asked.rows, replace=False)))
    return runs, test
