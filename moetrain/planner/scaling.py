"""A scaling law fitted to the losses of small runs, as Hoffmann et al. fit theirs (arXiv 2203.15556, approach 3).

    L(N, D) = E + A / N^alpha + B / D^beta

found by minimising the Huber loss (delta 1e-3) between log L and the log of the right side, from many starts by L-BFGS.
The same with one term where only one quantity was varied. N: parameters, as the caller counts them; D: tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

DELTA = 1e-3
STARTS = 24
POWERS = (0.01, 4.0)  # limits of alpha and beta


@dataclass(frozen=True)
class Law:
    """L(x) = floor + sum over k of scale[k] / x[k]^power[k]."""

    floor: float
    scale: tuple[float, ...]
    power: tuple[float, ...]

    @property
    def limited(self) -> tuple[bool, ...]:
        """For each term whether its power is at a limit: the runs do not show how the loss falls with it."""
        return tuple(not 1.01 * POWERS[0] < power < 0.99 * POWERS[1] for power in self.power)

    def __call__(self, *x: float) -> float:
        """The loss at ``x``, one number for each term."""
        return self.floor + sum(a / v**p for a, p, v in zip(self.scale, self.power, x, strict=True))


def needed(terms: int) -> int:
    """The fewest runs for a law of so many terms: one more than it has numbers."""
    return 2 * terms + 2


def fit(x_NK: np.ndarray, loss_N: np.ndarray, starts: int = STARTS) -> Law:
    """The law of K terms for N runs, the best from so many starts. Raises ValueError: too few runs, or values that are
    not above 0."""
    n, terms = x_NK.shape
    if n < needed(terms):
        raise ValueError(f"a law of {terms} terms needs {needed(terms)} runs or more, got {n}")
    if not (np.isfinite(x_NK).all() and np.isfinite(loss_N).all() and (x_NK > 0).all() and (loss_N > 0).all()):
        raise ValueError("sizes and losses must be finite and above 0")
    from scipy.optimize import minimize

    middle_K = np.log(x_NK).mean(axis=0)
    z_NK, y_N = np.log(x_NK) - middle_K, np.log(loss_N)
    bounds = [(None, float(y_N.min()))] + [(None, None)] * terms + [POWERS] * terms
    nearest = sorted(_starts(y_N, terms), key=lambda theta: _objective(theta, z_NK, y_N)[0])[:starts]
    found = [
        minimize(_objective, start, (z_NK, y_N), jac=True, method="L-BFGS-B", bounds=bounds,
                 options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10})
        for start in nearest
    ]  # fmt: skip
    theta = min(found, key=lambda one: one.fun).x
    power = theta[1 + terms :]
    scale = np.exp(theta[1 : 1 + terms] + power * middle_K)
    return Law(float(np.exp(theta[0])), tuple(map(float, scale)), tuple(map(float, power)))


def _starts(y_N: np.ndarray, terms: int) -> list[np.ndarray]:
    """A grid of (log floor, log of each term at the middle of the runs, powers)."""
    low, span = float(y_N.min()), np.exp(float(y_N.mean()))
    floors = [low - below for below in (0.02, 0.1, 0.3, 0.7, 1.5, 3.0)]
    heights = [float(np.log(span * share)) for share in (0.01, 0.05, 0.2, 0.5)]
    powers = [0.1, 0.3, 0.6, 1.0, 1.8]
    tails = itertools.product(itertools.product(heights, repeat=terms), itertools.product(powers, repeat=terms))
    return [np.array([floor, *a, *p]) for (a, p), floor in itertools.product(tails, floors)]


def _objective(theta: np.ndarray, z_NK: np.ndarray, y_N: np.ndarray) -> tuple[float, np.ndarray]:
    """(sum of Huber losses, gradient) at theta = (e, a_1 ... a_K, p_1 ... p_K), where log L = LSE(e, a_k - p_k z_k)."""
    terms = z_NK.shape[1]
    parts = np.column_stack([np.full(len(y_N), theta[0]), theta[1 : 1 + terms] - theta[1 + terms :] * z_NK])
    top = parts.max(axis=1, keepdims=True)
    weights = np.exp(parts - top)
    total = weights.sum(axis=1, keepdims=True)
    off = (top + np.log(total))[:, 0] - y_N
    inside = np.abs(off) <= DELTA
    value = np.where(inside, 0.5 * off**2, DELTA * (np.abs(off) - 0.5 * DELTA)).sum()
    slope = np.where(inside, off, DELTA * np.sign(off))[:, None] * weights / total
    return float(value) / DELTA**2, np.concatenate([slope.sum(axis=0), -(slope[:, 1:] * z_NK).sum(axis=0)]) / DELTA**2
