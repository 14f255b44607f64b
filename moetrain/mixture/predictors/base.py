"""What a predictor is."""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

import numpy as np


class Predictor(Protocol):
    """Learns the loss on one target from N runs over D domains."""

    def fit(self, x_ND: np.ndarray, y_N: np.ndarray) -> Self:
        """Learn from mixtures ``x_ND`` (each row sums to 1) and their losses ``y_N``."""
        ...

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        """Losses (N,) of these mixtures."""
        ...


@runtime_checkable
class KnowsLeftOut(Protocol):
    """A predictor that can say at little cost what it would predict for its own rows without having seen them."""

    def left_out(self) -> np.ndarray:
        """Losses (N,) of the fit rows, each predicted from all the others."""
        ...
