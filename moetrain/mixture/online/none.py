"""No mixer: the weights are those of the config."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from moetrain.config.registry import MIXERS
from moetrain.config.schema import STRICT


@dataclass(config=STRICT)
class NoneOptions:
    """Weights as the config and its schedule say."""


@MIXERS.register("none", NoneOptions)
class NoMixer:
    """Never built."""
