"""The default predictor: an average of others, weighted by how well each predicts runs that it was not fitted to."""

from __future__ import annotations

from typing import Self

import numpy as np

from moetrain.mixture.predictors.base import KnowsLeftOut, Predictor
from moetrain.mixture.predictors.gaussian import GaussianProcess
from moetrain.mixture.predictors.law import MixingLaw
from moetrain.mixture.predictors.trees import LightGBM

FOLDS = 5
# What carries over to larger models cannot be seen in the small runs. There the law loses least, so it has this share
# at least; on runs of one size it costs next to nothing.
LAW_SHARE = 0.15


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
        errors = {name: float(np.mean((self.held_out(name, x_ND, y_N) - y_N) ** 2)) for name in self.fitted}
        shares = {name: 1 / (error + 1e-12) for name, error in errors.items()}
        total = sum(shares.values())
        law = max(shares["law"] / total, LAW_SHARE)
        rest = (1 - law) / (total - shares["law"])
        self.shares = {name: law if name == "law" else share * rest for name, share in shares.items()}
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
