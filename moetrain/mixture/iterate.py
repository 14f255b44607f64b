"""The search in rounds: try mixtures, learn from all so far, try those that look best (CLIMB, arXiv 2504.13161).

One round is RegMix (arXiv 2407.01492).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moetrain.config.errors import TrainError
from moetrain.mixture.propose import DRAWS, Proposal, propose
from moetrain.mixture.runs import LEAST_FIT, Runs
from moetrain.mixture.sampling import POOL, draw_pool, sample, sample_best
from moetrain.mixture.study import fit_all

logger = logging.getLogger("moetrain")


class Runner(Protocol):
    """What finds out the losses of mixtures: by training proxies, by merging models, by a formula in a test."""

    domains: list[str]
    targets: list[str]

    def run(self, x_ND: np.ndarray, round_: int) -> np.ndarray:
        """(N, M) losses of the mixtures of round ``round_`` (from 1); a row of NaN where a run failed."""
        ...


@dataclass(frozen=True)
class Plan:
    """How to search. rounds: runs of each round. target, predictor, cap, draws, seed: as the command explains them.
    pool: draws that a later round, and the proposal besides ``draws``, choose from."""

    rounds: Sequence[int]
    target: str
    predictor: str = "default"
    cap: float | None = None
    draws: int = DRAWS
    seed: int = 0
    pool: int = POOL


def search(
    runner: Runner, prior_D: np.ndarray, plan: Plan, seen: Callable[[Runs], None] = lambda runs: None
) -> tuple[Runs, Proposal, Callable[[np.ndarray], np.ndarray]]:
    """All runs, the proposed mixture, and the predicted loss as a function of mixtures (N, D).

    seen: called with all runs so far after each round. The same mixtures are drawn at every call with the same
    arguments and losses, so a runner that remembers its runs makes the search go on where it was stopped.
    Raises TrainError where too few runs succeed.
    """
    domains = len(prior_D)
    runs = Runs(runner.domains, runner.targets, np.empty((0, domains)), np.empty((0, len(runner.targets))))
    tried = np.empty((0, domains))
    predict: Callable[[np.ndarray], np.ndarray] | None = None
    for number, count in enumerate(plan.rounds, 1):
        if predict is None:
            x_ND = sample(prior_D, count, plan.seed, plan.cap)
        else:
            pool = draw_pool(prior_D, best_so_far(predict, runs), plan.pool, plan.seed + number, plan.cap)
            x_ND = sample_best(predict, pool, count, plan.seed + number, tried)
        logger.info("round %d of %d: %d mixtures", number, len(plan.rounds), count)
        losses = runner.run(x_ND, number)
        tried = np.concatenate([tried, x_ND])
        good = np.isfinite(losses).all(axis=1)
        weights = np.concatenate([runs.weights, x_ND[good]])
        runs = Runs(runs.domains, runs.targets, weights, np.concatenate([runs.losses, losses[good]]))
        if len(runs.weights) < LEAST_FIT:
            raise TrainError(f"only {len(runs.weights)} of {len(tried)} runs succeeded; {LEAST_FIT} are needed")
        seen(runs)
        predict = fit_all(runs, plan.seed, [plan.predictor]).loss_of(plan.predictor, plan.target)
    assert predict is not None
    pool = draw_pool(prior_D, best_so_far(predict, runs), plan.pool, plan.seed, plan.cap)
    return runs, propose(predict, prior_D, plan.seed, plan.cap, plan.draws, extra=pool), predict


def best_so_far(predict: Callable[[np.ndarray], np.ndarray], runs: Runs) -> np.ndarray:
    """(D,) the mean of the tenth of the runs for which the lowest losses are predicted, which noise misleads less than
    losses measured once."""
    order = np.argsort(predict(runs.weights), kind="stable")
    return runs.weights[order[: max(1, len(order) // 10)]].mean(axis=0)
