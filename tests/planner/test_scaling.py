"""The fit of a scaling law, on losses of laws that are known: the one that Hoffmann et al. publish, and one term."""

from __future__ import annotations

import numpy as np
import pytest

from moetrain.planner.scaling import Law, fit

pytest.importorskip("scipy")

# arXiv 2203.15556, equation 10: the fit of approach 3.
CHINCHILLA = Law(1.69, (406.4, 410.7), (0.34, 0.28))
SIZES = np.array([(n, d) for n in (44e6, 175e6, 425e6, 1e9, 3e9) for d in (1e9, 8e9, 6e10, 3e11)])


def test_the_published_law_is_found_from_its_losses() -> None:
    law = fit(SIZES, np.array([CHINCHILLA(*row) for row in SIZES]))
    assert law.floor == pytest.approx(1.69, rel=1e-4)
    assert law.scale == pytest.approx((406.4, 410.7), rel=1e-3)
    assert law.power == pytest.approx((0.34, 0.28), rel=1e-4)


def test_noise_and_a_run_that_went_wrong_move_the_prediction_little() -> None:
    """Half a per cent of noise and one loss 20% too high, which the Huber loss does not follow: Chinchilla's own size
    and tokens, 23 times beyond the largest run, are told to 2%."""
    losses = np.array([CHINCHILLA(*row) for row in SIZES]) * np.exp(0.005 * np.random.default_rng(0).normal(size=20))
    losses[7] *= 1.2
    assert fit(SIZES, losses)(70e9, 1.4e12) == pytest.approx(CHINCHILLA(70e9, 1.4e12), rel=0.02)


def test_one_term_is_a_power_law_of_compute() -> None:
    """With the exponent that Kaplan et al. give for compute (arXiv 2001.08361, 0.050) and without a floor near zero."""
    c = np.geomspace(1e15, 1e19, 8)[:, None]
    law = fit(c, 1.2 + 20 / c[:, 0] ** 0.050)
    assert law.power[0] == pytest.approx(0.050, rel=1e-2)
    assert law(1e21) == pytest.approx(1.2 + 20 / 1e21**0.050, rel=1e-4)


def test_what_cannot_be_fitted_says_why() -> None:
    with pytest.raises(ValueError, match="needs 6 runs or more, got 5"):
        fit(SIZES[:5], np.ones(5))
    with pytest.raises(ValueError, match="finite and above 0"):
        fit(SIZES, np.full(20, np.nan))
