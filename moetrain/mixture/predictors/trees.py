"""Boosted trees, the predictor of RegMix (arXiv 2407.01492)."""

from __future__ import annotations

from typing import Self

import numpy as np

from moetrain.mixture.extra import need


class LightGBM:
    """LightGBM regression. The RegMix settings: 1000 rounds at rate 0.01, 31 leaves, at least 20 rows a leaf.

    Their code stops early on the test rows; here nothing does, so nothing is learnt from them. 8 leaves of 3 rows or
    more at rate 0.05 do better from few runs: with 20 rows a leaf, 25 runs cannot be split at all.
    """

    def __init__(self, seed: int, rounds: int, rate: float, leaves: int, least_rows: int) -> None:
        self.rounds = rounds
        self.settings = {
            "objective": "regression",
            "learning_rate": rate,
            "num_leaves": leaves,
            "min_data_in_leaf": least_rows,
            "seed": seed + 42,  # 42 is the authors'
            "verbosity": -1,
            "num_threads": 1,  # the data is small, and the result must not depend on the machine
            "deterministic": True,
            "force_row_wise": True,
        }

    def fit(self, x_ND: np.ndarray, y_N: np.ndarray) -> Self:
        lightgbm = need("lightgbm")
        # The dataset bins its values under the same settings
        self.trees = lightgbm.train(self.settings, lightgbm.Dataset(x_ND, y_N, params=self.settings), self.rounds)
        return self

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        return np.asarray(self.trees.predict(x_ND, num_threads=1))
