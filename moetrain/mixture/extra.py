"""Packages that only some commands need. They come with the extra of the command's name, imported when used."""

from __future__ import annotations

import importlib
from typing import Any

from moetrain.config.errors import ConfigError


def need(module: str, command: str = "mixture") -> Any:
    """The module called ``module``, for ``moetrain COMMAND``. Raises ConfigError with the way to install it where it
    cannot be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: LightGBM without the OpenMP library of the system
        package = module.split(".")[0]
        raise ConfigError(
            f"'moetrain {command}' needs {package}: pip install 'moetrain[{command}]' ({type(error).__name__}: {error})"
        ) from error
