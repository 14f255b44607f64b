"""Options of registered kinds, whether they come from a loaded config or from Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.config.errors import ConfigError
from moetrain.config.registry import Registry
from moetrain.config.typed import validate


def as_options(kinds: Registry, value: Any, name: str | None = None) -> Any:
    """``value`` if it is an options object already; else one made from a mapping of settings.

    name: the kind, where the mapping does not tell it under ``kind``. Raises ConfigError naming the setting at fault.
    """
    if not isinstance(value, Mapping):
        return value
    settings = dict(value)
    name = settings.pop("kind", name)
    if name is None:
        raise ConfigError(f"a {kinds.what} needs a 'kind'; known: {', '.join(kinds.names())}")
    return validate(kinds.get(name).options, settings, name)
