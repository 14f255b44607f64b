"""The optimizer's state of a parent, as that of the result: every moment goes where its parameter goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moetrain.checkpoint.weights import OPTIMIZER, Box, SavedWeights, Spec
from moetrain.config.errors import ConfigError
from moetrain.convert.open import Opened, has_optimizer
from moetrain.upcycle.method import Made, Model, Upcycled

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = Spec((), torch.float32)


class _Quantity:
    """A ``Source`` of one quantity of every parameter of ``saved``, under the names of the parameters."""

    def __init__(self, saved: SavedWeights, quantity: str) -> None:
        self._saved, self._end = saved, f".{quantity}"
        self.specs = {
            name.removesuffix(self._end): spec for name, spec in saved.specs.items() if name.endswith(self._end)
        }

    def read(self, name: str, box: Box = ()) -> Tensor:
        """See ``Source``."""
        return self._saved.read(name + self._end, box)


def carried(made: Upcycled, opened: Opened, method: str) -> Made:
    """AdamW's state "<parameter>.<quantity>" of what was ``made`` of ``opened``. Routers, which are new, have none yet.

    Raises ConfigError: the method does not carry state, there is none or not of all, or it is another optimizer's.
    """
    if made.moments is None:
        raise ConfigError(f"optimizer=true: method={method} does not carry optimizer state, sparse does")
    if not has_optimizer(opened):
        raise ConfigError(f"optimizer=true: {opened.path} has no optimizer state; give a run or a checkpoint of one")
    saved = SavedWeights(opened.path, OPTIMIZER)
    have = {name.rpartition(".")[0] for name in saved.specs}
    frozen = next((name for name in opened.source.specs if name not in have), None)
    if frozen is not None:
        raise ConfigError(
            f"optimizer=true: {opened.path} has no state of {frozen}, which was not trained (train.freeze); take "
            "optimizer=true out, the result starts with a fresh optimizer then"
        )
    if any(f"{name}.{quantity}" not in saved.specs for name in opened.source.specs for quantity in (*MOMENTS, "step")):
        raise ConfigError(f"optimizer=true knows the state of AdamW, {opened.path} has another optimizer's")
    steps = _Quantity(saved, "step")
    step = steps.read(next(iter(steps.specs)))
    specs: dict[str, Spec] = {}
    makers: dict[str, Callable[[Box], Tensor]] = {}
    for quantity in MOMENTS:
        source = made.moments(Model(opened.model, _Quantity(saved, quantity))).source
        for name, spec in source.specs.items():
            specs[f"{name}.{quantity}"] = spec
            makers[f"{name}.{quantity}"] = partial(source.read, name)
    for name in made.model.source.specs:
        specs[f"{name}.step"] = STEP
        makers[f"{name}.step"] = partial(_whole, torch.zeros_like(step) if ".moe.router." in name else step)
    return Made(specs, makers)


def _whole(value: Tensor, box: Box) -> Tensor:
    return value
