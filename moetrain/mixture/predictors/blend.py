"""The default predictor: an average of others, weighted by how well each predicts runs that it was not fitted to."""

from __future__ import annotations

from typing import Self

import numpy as np

from moetrain.mixture.predictors.base import KnowsLeftOut, Predictor
from moetrain.mixture.predictors.gaussian import GaussianProcess
from moetrain.mixture.predictors.law import MixingLaw
from moetrain.mixture.predictors.trees import LightGBM

FOLDS = 5
GRID = 101  # shares of the law that are tried, from 0 to 1


class Blend:
    """Weighted mean of two Gaussian processes, small trees and the mixing law.

    The weights go as 1 / (cross-validated squared error on the fit rows), except for the law's: what carries over to
    larger models cannot be seen in runs of one size, and there the simplest member, the law, loses least. So it gets
    the largest share whose cross-validated error is within one standard error of the best share's: the one-standard-
    error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def members(self) -> dict[str, Predictor]:
        return {
            "law": MixingLaw(),
            "gp": GaussianProcess(),
            "gp-law": GaussianProcess(law=True),
            "lightgbm-small": LightGBM(self.seed, rounds=500, rate=0.05, leaves=8, least_rows=3),
        }

    def fit(self, x_ND: np.ndarray, y_N: np.ndarray) -> Self:
        self.fitted = {name: member.fit(x_ND, y_N) for name, member in self.members().items()}
        held_out = {name: self.held_out(name, x_ND, y_N) for name in self.fitted}
        law_N = held_out.pop("law")
        inverse = {name: 1 / (float(np.mean((values - y_N) ** 2)) + 1e-12) for name, values in held_out.items()}
        rest = {name: value / sum(inverse.values()) for name, value in inverse.items()}
        others_N = np.sum([share * held_out[name] for name, share in rest.items()], axis=0)
        law = largest_share(law_N - y_N, others_N - y_N)
        self.shares = {"law": law} | {name: (1 - law) * share for name, share in rest.items()}
        return self

    def held_out(self, name: str, x_ND: np.ndarray, y_N: np.ndarray) -> np.ndarray:
        """(N,) what the member would say of each fit row without it: its own word, or by cross-validation."""
        member = self.fitted[name]
        if isinstance(member, KnowsLeftOut):
            return member.left_out()
        folds = np.random.default_rng(self.seed).permutation(len(y_N)) % FOLDS
        predicted = np.empty(len(y_N))
        for fold in range(FOLDS):
            out = folds == fold
            predicted[out] = self.members()[name].fit(x_ND[~out], y_N[~out]).predict(x_ND[out])
        return predicted

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        total = np.zeros(len(x_ND))
        for name, member in self.fitted.items():
            total += self.shares[name] * member.predict(x_ND)
        return total


def largest_share(simple_N: np.ndarray, others_N: np.ndarray) -> float:
    """The largest share of the first in the mean of two predictions, of which these are the errors, by the rule of one
    standard error."""
    shares = np.linspace(0, 1, GRID)
    squares_GN = (shares[:, None] * simple_N + (1 - shares)[:, None] * others_N) ** 2
    means = squares_GN.mean(axis=1)
    best = means.argmin()
    bound = means[best] + squares_GN[best].std() / len(simple_N) ** 0.5
    return float(shares[means <= bound].max())
