"""Parameters that are not trained: ``train.freeze`` names them. No gradient, no optimizer state, no weight decay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from moetrain.config.errors import ConfigError
from moetrain.config.presets import nearest
from moetrain.config.schema import Config, ExpertsConfig
from moetrain.config.sizes import Sizes
from moetrain.model.decoder import Decoder
from moetrain.parallel.stages import Stage, all_stages


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether parameter ``name`` matches one of ``patterns``, in which * stands for any text."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters of ``model`` that ``patterns`` name out of training, in place."""
    for name, p in model.named_parameters():
        if is_frozen(name, patterns):
            p.requires_grad_(False)


def frozen_sizes(cfg: Config, sizes: Sizes) -> dict[str, int]:
    """Frozen parameters of the whole model: name -> numbers in it.

    Raises ConfigError for a pattern that names nothing, and where a stage of the pipeline has nothing left to train.
    """
    patterns = cfg.train.freeze
    if not patterns:
        return {}
    with torch.device("meta"):
        model = Decoder(cfg.model, {}, ExpertsConfig())
    numel = {name: p.numel() for name, p in model.named_parameters()}
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in numel))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in numel):
            raise ConfigError(f"train.freeze: '{pattern}' names no parameter; {nearest(pattern, kinds)}")
    trained = [name for name in numel if not is_frozen(name, patterns)]
    if not trained:
        raise ConfigError(f"train.freeze={list(patterns)} freezes every parameter: nothing is left to train")
    for stage in all_stages(cfg, sizes) if sizes.pp > 1 else ():
        if not any(_holds(stage, name) for name in trained):
            raise ConfigError(
                f"train.freeze={list(patterns)} leaves pipeline stage {stage.index} (layers {stage.layers.start}-"
                f"{stage.layers.stop - 1}) nothing to train, and its optimizer would be empty; "
                "use parallel.pp=1, another parallel.layout, or freeze less"
            )
    return {name: numel[name] for name in numel if is_frozen(name, patterns)}


def _holds(stage: Stage, name: str) -> bool:
    """Whether ``stage`` trains parameter ``name``; a table that embedding and head share is trained on the first."""
    part, *rest = name.split(".")
    if part == "layers":
        return int(rest[0]) in stage.layers
    return stage.first if part == "embed" else stage.last
