"""Mixtures as presets of the group ``mixture``, which a sweep can run over: ``+mixture=glob(r1-*)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from moetrain.mixture.shares import preset

GROUP = "mixture"


def write_presets(folder: Path, prefix: str, names: Mapping[str, str], rows: Sequence[Sequence[float]]) -> None:
    """``folder/mixture/PREFIX-000.yaml`` ... names: domain -> what sets its weight (``setting_names``); rows: weights
    in the same order."""
    width = max(3, len(str(len(rows) - 1)))
    for number, weights in enumerate(rows):
        write_preset(folder, f"{prefix}-{number:0{width}d}", names, dict(zip(names, weights, strict=True)))


def write_preset(folder: Path, name: str, names: Mapping[str, str], weights: Mapping[str, float]) -> None:
    """``folder/mixture/NAME.yaml``."""
    text = "# @package _global_\n" + yaml.safe_dump(preset(names, weights), sort_keys=False)
    (folder / GROUP).mkdir(parents=True, exist_ok=True)
    (folder / GROUP / f"{name}.yaml").write_text(text, encoding="utf-8")
