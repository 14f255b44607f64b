"""Packages that only ``moetrain mixture`` needs. They come with the extra ``mixture``, imported when used."""

from __future__ import annotations

import importlib
from typing import Any

from moetrain.config.errors import ConfigError


def need(module: str) -> Any:
    """The module called ``module``. Raises ConfigError with the way to install it where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: LightGBM without the OpenMP library of the system
        package = module.split(".")[0]
        raise ConfigError(
            f"'moetrain mixture' needs {package}: pip install 'moetrain[mixture]' ({type(error).__name__}: {error})"
        ) from error
