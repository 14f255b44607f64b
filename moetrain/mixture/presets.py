"""Mixtures as presets of the group ``mixture``, which a sweep can run over: ``+mixture=glob(r1-*)``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

GROUP = "mixture"


def write_presets(folder: Path, prefix: str, domains: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """``folder/mixture/PREFIX-000.yaml`` ... each sets ``data.sources.DOMAIN.weight`` of all domains."""
    width = max(3, len(str(len(rows) - 1)))
    for number, weights in enumerate(rows):
        write_preset(folder, f"{prefix}-{number:0{width}d}", domains, weights)


def write_preset(folder: Path, name: str, domains: Sequence[str], weights: Sequence[float]) -> None:
    """``folder/mixture/NAME.yaml``."""
    sources = {domain: {"weight": round(float(weight), 6)} for domain, weight in zip(domains, weights, strict=True)}
    text = "# @package _global_\n" + yaml.safe_dump({"data": {"sources": sources}}, sort_keys=False)
    (folder / GROUP).mkdir(parents=True, exist_ok=True)
    (folder / GROUP / f"{name}.yaml").write_text(text, encoding="utf-8")
