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
POOL = 20_000  # mixtures that later rounds choose from
NEAR = (10.0, 300.0, 15)  # strengths of the draws around the best so far
EXPLORE = 0.1  # share of the prior in their mean


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
    predict: Callable[[np.ndarray], np.ndarray], pool_ND: np.ndarray, count: int, seed: int, taken_ND: np.ndarray
) -> np.ndarray:
    """(count, D) mixtures at random among those of ``pool_ND`` that ``predict`` likes best, without ``taken_ND``: a
    round of CLIMB (arXiv 2504.13161). The best are a tenth of the pool, but ten times ``count`` at most."""
    known = {row.tobytes() for row in to_units(taken_ND)}
    pool_ND = pool_ND[[row.tobytes() not in known for row in to_units(pool_ND)]]
    if len(pool_ND) < count:
        raise ConfigError(f"only {len(pool_ND)} mixtures are left to try; raise cap or lower runs")
    best = np.argsort(predict(pool_ND), kind="stable")[: max(count, min(10 * count, len(pool_ND) // 10))]
    return pool_ND[np.random.default_rng([seed, 1]).choice(best, count, replace=False)]


def draw_pool(prior_D: np.ndarray, best_D: np.ndarray, draws: int, seed: int, cap: float | None = None) -> np.ndarray:
    """(N, D) different mixtures to choose from: half like those of ``sample``, half around ``best_D``. With many
    domains hardly any of the first lies near the best."""
    rng = np.random.default_rng(seed)
    wide = draw_many(prior_D, draws // 2, rng, cap)
    centre_D = (1 - EXPLORE) * best_D + EXPLORE * prior_D  # or a domain of weight 0 would never come back
    near = dirichlet(centre_D, np.geomspace(*NEAR), draws - draws // 2, rng)
    return np.unique(np.concatenate([to_units(wide), to_units(within(near, prior_D, cap))]), axis=0) * UNIT


def draw_many(prior_D: np.ndarray, draws: int, rng: np.random.Generator, cap: float | None = None) -> np.ndarray:
    """The different mixtures among ``draws`` Dirichlet draws that keep to the bound, (N, D), in a fixed order."""
    mean_D = prior_D**TEMPERATURE
    drawn = dirichlet(mean_D / mean_D.sum(), np.geomspace(*STRENGTHS), draws, rng)
    return np.unique(to_units(within(drawn, prior_D, cap)), axis=0) * UNIT


def dirichlet(mean_D: np.ndarray, strengths: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws or fewer, D): Dirichlet draws with parameters ``mean_D`` times one of ``strengths``, chosen at random."""
    gammas = rng.standard_gamma(rng.choice(strengths, (draws, 1)) * mean_D)
    sums = gammas.sum(axis=1, keepdims=True)
    kept = sums[:, 0] > 0  # tiny parameters can underflow in all domains at once
    return gammas[kept] / sums[kept]


def within(x_ND: np.ndarray, prior_D: np.ndarray, cap: float | None) -> np.ndarray:
    """The rows that keep to the bound."""
    return x_ND[(x_ND <= np.minimum((cap or MOST) * prior_D, 1)).all(axis=1)]


def to_units(x_ND: np.ndarray) -> np.ndarray:
    """Weights as whole multiples of ``UNIT`` that sum to 1 / UNIT; what rounding leaves goes to the largest."""
    kept = np.where(x_ND < UNIT, 0, x_ND)
    units = np.rint(kept / kept.sum(axis=1, keepdims=True) / UNIT).astype(np.int64)
    units[np.arange(len(units)), units.argmax(axis=1)] += round(1 / UNIT) - units.sum(axis=1)
    return units
