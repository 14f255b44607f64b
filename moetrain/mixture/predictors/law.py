"""The exponential mixing law of "Data Mixing Laws" (arXiv 2403.16952)."""

from __future__ import annotations

from typing import Self

import numpy as np

from moetrain.mixture.extra import need

# The law's constant c is first guessed to lie below the smallest loss by these multiples of the losses' range. A small
# one bends the law much, a large one makes it nearly linear; the fit has several optima and the best is kept.
GUESSES = (0.02, 0.1, 0.3, 1.0, 3.0)
# Errors above this (in nats) count linearly, so that a few odd runs do not decide the fit.
HUBER = 0.03
# Keeps exp finite while the search tries wild values.
LARGEST = 50.0


class MixingLaw:
    """loss = c + exp(t . x): D + 1 numbers. The factor before exp is in t, since the weights sum to 1."""

    def fit(self, x_ND: np.ndarray, y_N: np.ndarray) -> Self:
        optimize = need("scipy.optimize")
        ones_N1 = np.ones((len(x_ND), 1))

        def errors(p: np.ndarray) -> np.ndarray:
            return law(p, x_ND) - y_N

        def slopes(p: np.ndarray) -> np.ndarray:
            return np.hstack([ones_N1, (law(p, x_ND) - p[0])[:, None] * x_ND])

        found = [
            optimize.least_squares(errors, start, slopes, loss="huber", f_scale=HUBER, max_nfev=200)
            for start in starts(x_ND, y_N)
        ]
        self.p = min(found, key=lambda one: one.cost).x
        return self

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        return law(self.p, x_ND)


def law(p: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
    """c + exp(t . x) for p = (c, t)."""
    return p[0] + np.exp(np.clip(x_ND @ p[1:], -LARGEST, LARGEST))


def starts(x_ND: np.ndarray, y_N: np.ndarray) -> list[np.ndarray]:
    """One start for each guess of c: with c known, t is a (slightly damped) linear regression of log(loss - c)."""
    domains = x_ND.shape[1]
    gram_DD = x_ND.T @ x_ND + 1e-3 * len(x_ND) / domains * np.eye(domains)
    spread = max(float(np.ptp(y_N)), 1e-6)
    constants = [float(y_N.min()) - guess * spread for guess in GUESSES]
    return [np.concatenate([[c], np.linalg.solve(gram_DD, x_ND.T @ np.log(y_N - c))]) for c in constants]
