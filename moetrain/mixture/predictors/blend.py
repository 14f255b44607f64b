"""The default predictor: an average of others, weighted by how well each predicts runs that it was not fitted to."""

from __future__ import annotations

from typing import Self

import numpy as np

from moetrain.mixture.predictors.base import KnowsLeftOut, Predictor
from moetrain.mixture.predictors.gaussian import GaussianProcess
from moetrain.mixture.predictors.law import MixingLaw
from moetrain.mixture.predictors.trees import LightGBM

FOLDS = 5
# What carries over to larger models cannot be seen in the small runs. There the law loses least, so it always has this share.
LAW_SHARE = 0.2


class Blend:
    """Weighted mean of two Gaussian processes, small trees and the mixing law.

    Weights go as 1 / (cross-validated squared error on the fit rows), and the law has at least ``LAW_SHARE``.
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
        folds = np.random.default_rng(self.seed).permutation(len(y_N)) % FOLDS
        errors = []
        for name, member in self.fitted.items():
            if isinstance(member, KnowsLeftOut):
                predicted = member.left_out()
            else:
                predicted = np.empty_like(y_N)
                for fold in range(FOLDS):
                    out = folds == fold
                    predicted[out] = self.members()[name].fit(x_ND[~out], y_N[~out]).predict(x_ND[out])
            errors.append(float(np.mean((predicted - y_N) ** 2)))
        shares = 1 / (np.array(errors) + 1e-12)
        self.shares = dict(zip(self.fitted, shares / shares.sum(), strict=True))
        return self

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        return sum((self.shares[name] * member.predict(x_ND) for name, member in self.fitted.items()), np.zeros(len(x_ND)))
