"""No mixer: the weights are those of the config."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from moetrain.config.fields import STRICT
from moetrain.config.registry import MIXERS


@dataclass(config=STRICT)
class NoneOptions:
    """Weights as the config and its schedule say."""


@MIXERS.register("none", NoneOptions)
class NoMixer:
    """Never built."""
