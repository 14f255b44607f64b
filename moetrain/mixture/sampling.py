"""Which mixtures to try: RegMix's draws (arXiv 2407.01492, section 3.1 and the authors' code)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moetrain.config.errors import ConfigError

TEMPERATURE = 0.5  # the draws' mean is the prior to this power: small domains are tried more than they weigh
STRENGTHS = (0.1, 5.0, 15)  # Dirichlet parameters are the mean times one of 15 numbers, spaced evenly in log
MOST = 15.0  # no domain gets more than this many times its prior
UNIT = 2e-4  # weights are multiples of it; smaller ones are 0
OVERSAMPLE = 100  # mixtures are picked at random from this many times as many
POOL = 50_000  # mixtures that later rounds choose from


def sample(prior_D: np.ndarray, count: int, seed: int, cap: float | None = None) -> np.ndarray:
    """(count, D) different mixtures around ``prior_D`` (positive, sums to 1); rows sum to 1.

    cap: no domain gets more than cap times its prior (None: 15 times, RegMix's bound, which stands for epochs).
    Raises ConfigError where there are not so many different ones.
    """
    drawn = draw_many(prior_D, OVERSAMPLE * count, np.random.default_rng(seed), cap)
    if len(drawn) < count:
        raise ConfigError(f"only {len(drawn)} different mixtures keep to cap={cap or MOST:g}; raise cap or lower runs")
    rows = np.random.default_rng([seed, 1]).choice(len(drawn), count, replace=False)
    return drawn[np.sort(rows)]


def sample_best(
    predict: Callable[[np.ndarray], np.ndarray],
    prior_D: np.ndarray,
    count: int,
    seed: int,
    cap: float | None = None,
    taken_ND: np.ndarray | None = None,
) -> np.ndarray:
    """(count, D) mixtures at random among those that ``predict`` likes best, as a round of CLIMB (arXiv 2504.13161).

    From ``POOL`` draws like those of ``sample`` without ``taken_ND``: the best tenth, but ten times ``count`` at most.
    """
    drawn = draw_many(prior_D, POOL, np.random.default_rng(seed), cap)
    if taken_ND is not None and len(taken_ND):
        known = {row.tobytes() for row in to_units(taken_ND)}
        drawn = drawn[[row.tobytes() not in known for row in to_units(drawn)]]
    if len(drawn) < count:
        raise ConfigError(f"only {len(drawn)} mixtures are left to try under cap={cap or MOST:g}; raise cap")
    best = np.argsort(predict(drawn), kind="stable")[: max(count, min(10 * count, len(drawn) // 10))]
    return drawn[np.random.default_rng([seed, 1]).choice(best, count, replace=False)]


def draw_many(prior_D: np.ndarray, draws: int, rng: np.random.Generator, cap: float | None = None) -> np.ndarray:
    """The different mixtures among ``draws`` Dirichlet draws that keep to the bound, (N, D), in a fixed order."""
    mean_D = prior_D**TEMPERATURE
    mean_D = mean_D / mean_D.sum()
    strengths = np.geomspace(*STRENGTHS)
    gammas = rng.standard_gamma(rng.choice(strengths, (draws, 1)) * mean_D)
    sums = gammas.sum(axis=1, keepdims=True)
    drawn = gammas[sums[:, 0] > 0] / sums[sums[:, 0] > 0]  # tiny parameters can underflow in all domains at once
    drawn = drawn[(drawn <= np.minimum((cap or MOST) * prior_D, 1)).all(axis=1)]
    return np.unique(to_units(drawn), axis=0) * UNIT


def to_units(x_ND: np.ndarray) -> np.ndarray:
    """Weights as whole multiples of ``UNIT`` that sum to 1 / UNIT; what rounding leaves goes to the largest."""
    kept = np.where(x_ND < UNIT, 0, x_ND)
    units = np.rint(kept / kept.sum(axis=1, keepdims=True) / UNIT).astype(np.int64)
    units[np.arange(len(units)), units.argmax(axis=1)] += round(1 / UNIT) - units.sum(axis=1)
    return units
