"""Loading a config from presets, and keeping a finished one in a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moetrain import __version__
from moetrain.config import presets
from moetrain.config.check import check_config
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.config.typed import resolve_kinds, to_dict, validate

# Version of config.yaml in a run directory. A change of meaning of an existing key raises it.
VERSION = 1


def load(
    overrides: Sequence[str] = (),
    *,
    base: Path | str | None = None,
    resumed: bool = False,
    config_dirs: Sequence[Path | str] = (),
    check: Callable[[Config], object] | None = None,
    kinds: bool = True,
    start: Callable[[str], Mapping[str, Any]] | None = None,
) -> Config:
    """The config of a run, checked.

    overrides: words of Hydra's grammar, ``model=olmoe_1b_7b`` (a preset) or ``train.steps=10`` (a setting).
    base: a saved config to start from instead of the presets; then overrides can be settings only.
    resumed: the run has begun; what depends on how it went so far is left to it to check.
    config_dirs: folders of further presets, laid out like ``configs/``.
    check: called with the config before the registries, and with them torch, are imported; it sees ``Kind`` fields as
        plain mappings. The place for checks against the number of ranks.
    start: called with the ``init`` of overrides; gives the settings that its weights bring (``presets.compose_tree``).
    kinds: False leaves ``Kind`` fields as those mappings, unchecked, and imports no torch.
    Raises ConfigError, one line.
    """
    if base is None:
        tree = presets.compose_tree(overrides, config_dirs, to_dict(Config()), start)
    else:
        settings = presets.parse(overrides)
        presets.refuse_presets(settings)
        tree = presets.apply_settings(OmegaConf.create(_read_tree(Path(base))), settings)
    return _finish(presets.resolve(tree), check, kinds, resumed)


def as_text(cfg: Config) -> str:
    """``cfg``, resolved, as YAML that ``read`` takes."""
    text = f"# Resolved config of a moetrain run, written by moetrain {__version__}.\n"
    return text + yaml.safe_dump({"config_version": VERSION, **_literal(to_dict(cfg))}, sort_keys=False, width=110)


def _literal(value: Any) -> Any:
    """``value`` with each ``${`` in its texts escaped: what is resolved must not be taken for an interpolation."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def save(cfg: Config, path: Path | str) -> None:
    """Write ``cfg``, resolved, as YAML that ``read`` takes; whole or not at all. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(as_text(cfg))
    temporary.replace(path)


def read(path: Path | str) -> Config:
    """The config that ``save`` wrote. Raises ConfigError when it is missing, damaged, or of another version."""
    return _finish(presets.resolve(OmegaConf.create(_read_tree(Path(path)))), None, True, True)


def _finish(tree: dict[str, Any], check: Callable[[Config], object] | None, kinds: bool, resumed: bool) -> Config:
    cfg = validate(Config, tree)
    check_config(cfg, resumed)
    if check is not None:
        check(cfg)
    if kinds:
        resolve_kinds(cfg)
    return cfg


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a config: {' '.join(str(error).split())}") from error
    tree = OmegaConf.to_container(loaded) if isinstance(loaded, DictConfig) else None
    if not isinstance(tree, dict) or "config_version" not in tree:
        raise ConfigError(f"{path} is not a saved config: it has no config_version")
    version = tree.pop("config_version")
    if version != VERSION:
        raise ConfigError(f"{path} has config_version {version}; this moetrain {__version__} reads version {VERSION}")
    return tree  # type: ignore[return-value]
