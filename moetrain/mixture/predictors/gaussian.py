"""Gaussian processes with one length scale per domain (Rasmussen and Williams, 2006, chapters 2 and 5)."""

from __future__ import annotations

from typing import Self

import numpy as np

from moetrain.mixture.extra import need

# Distances are between log(weight + FLOOR): what counts is by which factor a domain changes, down to about FLOOR.
FLOOR = 0.001
# Logs of the length scales have this normal prior (weights span about 7 in log), which matters with few runs only.
PRIOR_MEAN, PRIOR_PRECISION = 1.5, 1.0
CHUNK = 4096


class GaussianProcess:
    """Covariance s2 exp(-distance^2 / 2) + noise, over log weights; all scales by maximal marginal likelihood.

    law=True: the process is over log(loss - c) and its covariance has a term linear in the weights, so that alone it
    would be the mixing law c + exp(t . x); the other part models what the law misses. c is found like the scales.
    """

    def __init__(self, law: bool = False) -> None:
        self.law = law

    def fit(self, x_ND: np.ndarray, y_N: np.ndarray) -> Self:
        optimize = need("scipy.optimize")
        self.mean_D = x_ND.mean(axis=0)
        self.z_ND, self.x_ND = features(x_ND), x_ND - self.mean_D
        self.low, self.spread = float(y_N.min()), max(float(np.ptp(y_N)), 1e-6)
        self.y_N = y_N
        domains = x_ND.shape[1]
        # p: logs of D lengths, s2, noise, then with law=True the linear term's s2 and (low - c) / spread
        length = np.log(max(self.z_ND.std(axis=0).mean(), 1e-3) * domains**0.5)
        start = [*[length] * domains, 0.0, -3.0] + ([0.0, -1.0] if self.law else [])
        bounds = [*[(-2, 6)] * domains, (-6, 8), (-12, 1)] + ([(-12, 8), (-4, 3.5)] if self.law else [])
        found = optimize.minimize(
            self.objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 200}
        )
        self.p = found.x
        self.condition()
        return self

    def warped(self, p: np.ndarray) -> tuple[np.ndarray, float]:
        """What the process is over, and the constant c."""
        if not self.law:
            return self.y_N, 0.0
        c = self.low - float(np.exp(p[-1])) * self.spread
        return np.log(self.y_N - c), c

    def covariances(self, p: np.ndarray, x_MD: np.ndarray, z_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
        """(M, N) covariances with the fit rows, without noise: the part of distances, and the linear part."""
        domains = z_MD.shape[1]
        lengths = np.exp(p[:domains])
        a, b = z_MD / lengths, self.z_ND / lengths
        squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * a @ b.T
        near = np.exp(p[domains] - np.maximum(squares, 0) / 2)
        return near, np.exp(p[domains + 2]) * (x_MD @ self.x_ND.T) if self.law else 0.0

    def objective(self, p: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log of marginal likelihood times prior, and its gradient in ``p``."""
        linalg = need("scipy.linalg")
        rows, domains = self.z_ND.shape
        near, linear = self.covariances(p, self.x_ND, self.z_ND)
        noise = np.exp(p[domains + 1])
        t_N, c = self.warped(p)
        scale = self.scale()
        t_N = (t_N - t_N.mean()) / scale
        root, failed = linalg.lapack.dpotrf(near + linear + noise * np.eye(rows), lower=1, clean=1)
        if failed:
            return 1e10, np.zeros_like(p)
        inverse = linalg.lapack.dpotri(root, lower=1)[0]
        inverse = np.tril(inverse) + np.tril(inverse, -1).T
        alpha = inverse @ t_N
        value = 0.5 * t_N @ alpha + np.log(np.diag(root)).sum()
        # d value = 1/2 trace(outer dK), and dK/dlength of the near part needs no (D, N, N) array:
        # sum_ij w_ij (z_i - z_j)^2 = 2 sum_i w_i. z_i^2 - 2 z.w.z
        outer = inverse - np.outer(alpha, alpha)
        w, z = outer * near, self.z_ND
        slope = np.zeros_like(p)
        slope[:domains] = (w.sum(axis=1) @ (z * z) - (z * (w @ z)).sum(axis=0)) / np.exp(2 * p[:domains])
        slope[domains] = 0.5 * w.sum()
        slope[domains + 1] = 0.5 * noise * np.trace(outer)
        if self.law:
            slope[domains + 2] = 0.5 * (outer * linear).sum()
            # c moves the warped losses, and their density: d log(y - c) / d p[-1] = (low - c) / (y - c)
            moved = (self.low - c) / (self.y_N - c)
            value += np.log(self.y_N - c).sum()
            slope[-1] = alpha @ (moved - moved.mean()) / scale + moved.sum()
        off = p[:domains] - PRIOR_MEAN
        slope[:domains] += PRIOR_PRECISION * off
        return float(value + 0.5 * PRIOR_PRECISION * off @ off), slope

    def scale(self) -> float:
        """A fixed unit for what the process is over, so that its variances start near 1."""
        return 1.0 if self.law else max(float(self.y_N.std()), 1e-6)

    def condition(self) -> None:
        """What predictions need, for the scales found."""
        linalg = need("scipy.linalg")
        rows = len(self.z_ND)
        near, linear = self.covariances(self.p, self.x_ND, self.z_ND)
        t_N, self.c = self.warped(self.p)
        self.centre, self.t_N = float(t_N.mean()), t_N
        noise = np.exp(self.p[self.z_ND.shape[1] + 1])
        self.inverse = linalg.cho_solve(linalg.cho_factor(near + linear + noise * np.eye(rows)), np.eye(rows))
        self.alpha = self.inverse @ (t_N - self.centre)

    def unwarp(self, t_N: np.ndarray) -> np.ndarray:
        return self.c + np.exp(t_N) if self.law else t_N

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        parts = []
        for rows in np.array_split(x_ND, max(1, -(-len(x_ND) // CHUNK))):
            near, linear = self.covariances(self.p, rows - self.mean_D, features(rows))
            parts.append(self.unwarp(self.centre + (near + linear) @ self.alpha))
        return np.concatenate(parts)

    def left_out(self) -> np.ndarray:
        """Rasmussen and Williams, equation 5.12: what each row's prediction would be without it, scales kept."""
        return self.unwarp(self.t_N - self.alpha / np.diag(self.inverse))


def features(x_ND: np.ndarray) -> np.ndarray:
    """The logs that distances are taken between."""
    return np.log(x_ND + FLOOR)
