"""How every parameter starts."""

from __future__ import annotations

from typing import Literal

from moetrain.config.schema import ModelConfig

ZERO = {"bias", "b13", "b2"}


def init_rule(fqn: str, cfg: ModelConfig) -> tuple[Literal["normal", "constant"], float]:
    """Initial values of parameter ``fqn``: ("normal", standard deviation), with mean 0, or ("constant", value).

    Norm weights are 1 (with their offset), biases 0, all else normal with ``cfg.init_std``: the rule of the models in
    configs/model.
    """
    *path, name = fqn.split(".")
    if name in ZERO:
        return "constant", 0.0
    if path and path[-1].endswith("norm"):
        return "constant", 1.0 - cfg.norm_offset
    return "normal", cfg.init_std
