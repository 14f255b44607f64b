"""Predictors of the loss of a mixture. A new one is one class with ``fit`` and ``predict``, and one line here."""

from __future__ import annotations

from collections.abc import Callable

from moetrain.mixture.predictors.base import Predictor
from moetrain.mixture.predictors.blend import Blend
from moetrain.mixture.predictors.gaussian import GaussianProcess
from moetrain.mixture.predictors.law import MixingLaw
from moetrain.mixture.predictors.linear import LeastSquares
from moetrain.mixture.predictors.trees import LightGBM

PREDICTORS: dict[str, Callable[[int], Predictor]] = {  # name -> what makes one from a seed
    "ols": lambda seed: LeastSquares(),
    "law": lambda seed: MixingLaw(),
    "lightgbm": lambda seed: LightGBM(seed, rounds=1000, rate=0.01, leaves=31, least_rows=20),
    "lightgbm-small": lambda seed: LightGBM(seed, rounds=500, rate=0.05, leaves=8, least_rows=3),
    "gp": lambda seed: GaussianProcess(),
    "gp-law": lambda seed: GaussianProcess(law=True),
    "default": lambda seed: Blend(seed),
}
