"""Fit every predictor to every target and score it on the test rows."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moetrain.mixture.extra import need
from moetrain.mixture.predictors import PREDICTORS
from moetrain.mixture.predictors.base import Predictor
from moetrain.mixture.runs import Runs

logger = logging.getLogger("moetrain")

MEAN, AVERAGE = "mean", "average"
FOLDS = 5


@dataclass(frozen=True)
class Study:
    """fitted: predictor -> one for each target, in the order of ``fit.targets``. Test rows have no part in it."""

    fit: Runs
    fitted: dict[str, list[Predictor]]

    def loss_of(self, predictor: str, target: str) -> Callable[[np.ndarray], np.ndarray]:
        """The function from mixtures (N, D) to losses (N,); of "mean", the mean over all targets, each predicted."""
        one_each = self.fitted[predictor]
        if target != MEAN:
            return one_each[self.fit.targets.index(target)].predict
        return lambda x_ND: np.mean([one.predict(x_ND) for one in one_each], axis=0)


def fit_all(fit: Runs, seed: int = 0, names: list[str] | None = None) -> Study:
    """Fit the predictors called ``names`` (all of them) to each target of ``fit``."""
    makers = {name: PREDICTORS[name] for name in names or PREDICTORS}
    fitted: dict[str, list[Predictor]] = {name: [] for name in makers}
    for number, target in enumerate(fit.targets):
        logger.info("fitting %d predictors to %s (%d of %d)", len(makers), target, number + 1, len(fit.targets))
        for name, make in makers.items():
            fitted[name].append(make(seed).fit(fit.weights, fit.losses[:, number]))
    return Study(fit, fitted)


def predictions(study: Study, x_ND: np.ndarray) -> dict[str, np.ndarray]:
    """Predictor -> (N, M) losses of these mixtures on all targets."""
    return {name: np.column_stack([one.predict(x_ND) for one in each]) for name, each in study.fitted.items()}


def cross_validated(fit: Runs, seed: int = 0, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """Predictor -> (N, M) losses of the fit runs, each predicted from the four fifths of the runs it is not in."""
    folds = np.random.default_rng(seed).permutation(len(fit.weights)) % FOLDS
    found = {name: np.empty_like(fit.losses) for name in names or PREDICTORS}
    for fold in range(FOLDS):
        logger.info("cross-validation, part %d of %d", fold + 1, FOLDS)
        out = folds == fold
        for name, values in predictions(fit_all(fit.pick(~out), seed, names), fit.weights[out]).items():
            found[name][out] = values
    return found


def score(predicted: dict[str, np.ndarray], test: Runs) -> dict[str, dict[str, float | None]]:
    """Predictor -> target -> Spearman correlation of ``predicted`` ((N, M) a predictor) and the losses of ``test``.

    Besides the targets, "average": the mean of these correlations; and "mean": the correlation for the mean of all
    losses. None where a predictor says the same of every row.
    """
    table: dict[str, dict[str, float | None]] = {}
    for name, losses_NM in predicted.items():
        row = {target: spearman(losses_NM[:, i], test.losses[:, i]) for i, target in enumerate(test.targets)}
        known = [value for value in row.values() if value is not None]
        row[AVERAGE] = sum(known) / len(known) if len(known) == len(row) else None
        row[MEAN] = spearman(losses_NM.mean(axis=1), test.losses.mean(axis=1))
        table[name] = row
    return table


def spearman(one_N: np.ndarray, other_N: np.ndarray) -> float | None:
    """Rank correlation, or None where one of the two is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constants, which the caller shows
        value = float(need("scipy.stats").spearmanr(one_N, other_N)[0])
    return None if math.isnan(value) else value
