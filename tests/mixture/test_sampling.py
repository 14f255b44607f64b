"""Drawn mixtures, and the search in rounds on losses whose optimum is known."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from moetrain.config.errors import ConfigError, TrainError
from moetrain.mixture.iterate import Plan, search
from moetrain.mixture.sampling import UNIT, draw_pool, sample, sample_best

PRIOR = np.array([0.4, 0.3, 0.2, 0.08, 0.02])


def test_mixtures_keep_to_the_rules_of_regmix() -> None:
    """Sums, the bound on use, the grid of weights, no copies, small domains tried more than they weigh; by seed."""
    x = sample(PRIOR, 300, seed=3, cap=4)
    assert x.shape == (300, 5)
    np.testing.assert_allclose(x.sum(axis=1), 1, atol=1e-9)
    assert (x >= 0).all() and (x <= np.minimum(4 * PRIOR, 1) + 1e-9).all()
    np.testing.assert_allclose(x / UNIT, np.rint(x / UNIT), atol=1e-6)
    assert len(np.unique(x, axis=0)) == 300
    assert (x == sample(PRIOR, 300, seed=3, cap=4)).all()
    assert (x != sample(PRIOR, 300, seed=4, cap=4)).any()
    free = sample(np.full(5, 0.2), 500, seed=0)
    np.testing.assert_allclose(free.mean(axis=0), 0.2, atol=0.05)
    assert (free.max(axis=1) > 0.95).mean() > 0.05 and (free.max(axis=1) < 0.5).mean() > 0.05  # corners and middles
    with pytest.raises(ConfigError, match=r"different mixtures keep to cap=1\.001"):
        sample(PRIOR, 300, seed=3, cap=1.001)


def test_a_later_round_takes_from_the_best_and_none_twice() -> None:
    """Half of the pool lies around the best so far, here a corner of the bound, and all of it keeps to the bound."""
    best = np.array([0.1, 0.1, 0.1, 0.6, 0.1])

    def loss(x_ND: np.ndarray) -> np.ndarray:
        return np.abs(x_ND - best).sum(axis=1)

    pool = draw_pool(PRIOR, best, 4000, seed=1, cap=10)
    assert (pool <= np.minimum(10 * PRIOR, 1) + 1e-9).all()
    assert np.quantile(loss(pool), 0.4) < 0.5 < np.quantile(loss(sample(PRIOR, 300, seed=0)), 0.1)
    none = np.empty((0, 5))
    first = sample_best(loss, pool, 20, 5, none)
    assert loss(first).max() < np.quantile(loss(pool), 0.1)
    again = sample_best(loss, pool, 20, 5, first)
    assert not {row.tobytes() for row in np.rint(first / UNIT)} & {row.tobytes() for row in np.rint(again / UNIT)}


class Known:
    """A runner whose losses are a formula: quadratic in the logs around an optimum inside, with noise."""

    domains: ClassVar = [f"d{i}" for i in range(8)]
    targets: ClassVar = ["web"]
    optimum = np.array([0.3, 0.02, 0.2, 0.05, 0.13, 0.1, 0.08, 0.12])

    def __init__(self, seed: int) -> None:
        self.rng, self.tried = np.random.default_rng(seed), 0

    def loss(self, x_ND: np.ndarray) -> np.ndarray:
        return 3 + 0.1 * (np.log((x_ND + 0.02) / (self.optimum + 0.02)) ** 2).sum(axis=1)

    def run(self, x_ND: np.ndarray, round_: int) -> np.ndarray:
        self.tried += len(x_ND)
        return (self.loss(x_ND) + self.rng.normal(0, 0.003, len(x_ND)))[:, None]


def test_rounds_beat_one_round_of_as_many_runs() -> None:
    """CLIMB's claim, with its kind of predictor, on a surface whose lowest loss is 3; two seeds."""
    left: dict[tuple[int, ...], list[float]] = {(48,): [], (24, 12, 12): []}
    for rounds, losses in left.items():
        for seed in range(2):
            runner = Known(seed)
            plan = Plan(rounds, "web", "lightgbm-small", draws=3000, seed=seed, pool=4000)
            _, found, _ = search(runner, np.full(8, 1 / 8), plan)
            assert runner.tried == 48
            losses.append(float(runner.loss(found.weights[None])[0]) - 3)
    assert np.mean(left[24, 12, 12]) < 0.8 * np.mean(left[48,])


def test_the_search_comes_near_the_optimum_and_leaves_failed_runs_out() -> None:
    class Failing(Known):
        def run(self, x_ND: np.ndarray, round_: int) -> np.ndarray:
            losses = super().run(x_ND, round_)
            losses[::7] = np.nan
            return losses

    seen: list[int] = []
    plan = Plan((40, 20), "web", "gp", draws=3000, pool=4000)
    runs, found, predict = search(Failing(0), np.full(8, 1 / 8), plan, lambda runs: seen.append(len(runs.weights)))
    assert seen == [34, 51]
    assert len(runs.weights) == 51
    assert Known(0).loss(found.weights[None])[0] < 3.05
    assert predict(found.weights[None])[0] == pytest.approx(found.loss)
    with pytest.raises(TrainError, match="8 of 10 runs succeeded; 10 are needed"):
        search(Failing(0), np.full(8, 1 / 8), Plan((10,), "web", "gp"))
