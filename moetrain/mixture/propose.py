"""The search for a mixture, as in RegMix (arXiv 2407.01492, section 3): draw many, predict all, average the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DRAWS, BEST = 100_000, 128  # RegMix's


@dataclass(frozen=True)
class Proposal:
    """weights, prior: (D,), each sums to 1. loss, prior_loss: what is predicted for them, in the unit of the runs."""

    weights: np.ndarray
    loss: float
    prior: np.ndarray
    prior_loss: float


def propose(
    predict: Callable[[np.ndarray], np.ndarray],
    prior_D: np.ndarray,
    seed: int = 0,
    cap: float | None = None,
    draws: int = DRAWS,
    best: int = BEST,
    extra: np.ndarray | None = None,
) -> Proposal:
    """The mean of the ``best`` of ``draws`` mixtures by ``predict`` ((N, D) mixtures -> (N,) losses, lower is better).

    The draws are Dirichlet with the prior itself as parameters, so most are near corners and edges and their mean is
    the prior. cap: no domain gets more than cap times its prior. extra: (N, D) further mixtures to choose from.
    """
    drawn = draw(prior_D, draws, seed)
    if cap is not None:
        drawn = capped(drawn, cap * prior_D)
    if extra is not None:
        drawn = np.concatenate([drawn, extra])
    order = np.argsort(predict(drawn), kind="stable")
    weights = drawn[order[:best]].mean(axis=0)
    loss, prior_loss = predict(np.stack([weights, prior_D]))
    return Proposal(weights, float(loss), prior_D, float(prior_loss))


def draw(prior_D: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws or fewer, D) Dirichlet mixtures, as gammas over their sum. A domain of prior 0 stays at 0."""
    gammas = np.random.default_rng(seed).standard_gamma(np.tile(prior_D, (draws, 1)))
    sums = gammas.sum(axis=1, keepdims=True)
    kept = sums[:, 0] > 0  # shapes far below 1 can underflow in all domains at once
    return gammas[kept] / sums[kept]


def capped(x_ND: np.ndarray, most_D: np.ndarray) -> np.ndarray:
    """Mixtures with no weight above ``most_D`` (whose sum is 1 or more).

    What is cut off goes to the other domains in proportion to the room that they have left, so no draw is lost.
    """
    x_ND = np.minimum(x_ND, most_D)
    room = most_D - x_ND
    missing = 1 - x_ND.sum(axis=1, keepdims=True)
    return x_ND + room * (missing / np.maximum(room.sum(axis=1, keepdims=True), 1e-12))
