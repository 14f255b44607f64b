"""The search against the optimum of a known law."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import minimize

from moetrain.mixture.propose import Proposal, capped, propose
from moetrain.mixture.report import show_proposal
from moetrain.mixture.runs import Runs
from moetrain.mixture.study import fit_all

from .conftest import DOMAINS, mixtures, true_losses

PRIOR = np.array([0.4, 0.3, 0.2, 0.1])


def optimum(most: float = 1.0) -> np.ndarray:
    """The best mixture for the mean of the known losses, by another way: constrained minimisation."""
    found = minimize(
        lambda x: true_losses(x[None]).mean(),
        PRIOR,
        bounds=[(0, most * share if most > 1 else 1) for share in PRIOR],
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
    )
    return found.x


def test_finds_the_optimum_of_a_known_law() -> None:
    best = optimum()
    assert (best > 0.05).sum() >= 2  # it lies inside
    found = propose(lambda x: true_losses(x).mean(axis=1), PRIOR)
    np.testing.assert_allclose(found.weights, best, atol=0.03)
    assert found.loss - true_losses(best[None]).mean() < 0.002
    assert found.prior_loss > found.loss
    again = propose(lambda x: true_losses(x).mean(axis=1), PRIOR)
    assert (again.weights == found.weights).all()


def test_finds_it_from_runs_alone() -> None:
    x = mixtures(60, 3)
    runs = Runs(DOMAINS, DOMAINS[:3], x, true_losses(x))
    found = propose(fit_all(runs, names=["gp-law"]).loss_of("gp-law", "mean"), PRIOR, draws=30_000)
    np.testing.assert_allclose(found.weights, optimum(), atol=0.05)


def test_a_cap_holds_and_the_rest_is_spent_well() -> None:
    found = propose(lambda x: true_losses(x).mean(axis=1), PRIOR, cap=1.4)
    assert (found.weights <= 1.4 * PRIOR + 1e-9).all()
    assert np.isclose(found.weights.sum(), 1)
    np.testing.assert_allclose(found.weights, optimum(1.4), atol=0.03)
    x = capped(mixtures(500, 0), 1.1 * PRIOR)
    assert np.allclose(x.sum(axis=1), 1)
    assert (x <= 1.1 * PRIOR + 1e-9).all()
    assert (x >= 0).all()


def test_a_proposal_keeps_domains_of_little_weight(capsys: pytest.CaptureFixture[str]) -> None:
    """A small share of a large run is not none: the settings have it, and sum to 1."""
    found = Proposal(np.array([0.9999666, 0.00003, 0.0000034]), 1.0, np.ones(3) / 3, 2.0)
    weights = show_proposal(Console(), {name: f"data.sources.{name}" for name in "abc"}, found, "a", "ols")
    assert weights == {"a": 0.999967, "b": 0.00003, "c": 0.000003}
    assert "a.weight=0.999967 data.sources.b.weight=3e-05 data.sources.c.weight=3e-06" in capsys.readouterr().out
