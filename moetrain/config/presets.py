"""The Hydra side of the config: preset files, overrides, and their composition into one plain tree.

Hydra composes the presets and reads the override grammar. It does not judge settings: every ``a.b=c`` is laid over the
composed tree as it is, and the schema refuses what it does not know, with the path and the nearest known key.

Hydra is imported where it is used, so that the modules of a model, which import the schema, do not load it.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moetrain.config.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

PRIMARY = "config"
# Folders of configs/ that are no part of a run: what ``planner.cluster`` reads.
NO_GROUPS = ("cluster",)


def config_root() -> Path:
    """The folder of the presets that ship with moetrain: inside an installed package, or ``configs/`` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_configs", package.parent / "configs"):
        if (folder / f"{PRIMARY}.yaml").is_file():
            return folder
    raise ConfigError(f"the presets are missing: no {PRIMARY}.yaml beside {package}; install moetrain again")


@dataclass(frozen=True)
class Presets:
    """The preset files under ``folders`` (moetrain's own first, then the user's ``--config-dir``)."""

    folders: tuple[Path, ...]

    @classmethod
    def find(cls, config_dirs: Sequence[Path | str] = ()) -> Presets:
        """Presets of moetrain and of ``config_dirs``. Raises ConfigError for a folder that does not exist."""
        extra = tuple(Path(folder).resolve() for folder in config_dirs)
        for folder in extra:
            if not folder.is_dir():
                raise ConfigError(f"--config-dir {folder} is not a folder")
        return cls((config_root(), *extra))

    def groups(self) -> dict[str, list[str]]:
        """Group ("model", "model/router" ...) -> the names of its presets, sorted."""
        names: dict[str, set[str]] = {}
        for folder in self.folders:
            for file in folder.rglob("*.yaml"):
                group = file.parent.relative_to(folder).as_posix()
                if group not in (".", *NO_GROUPS):
                    names.setdefault(group, set()).add(file.stem)
        return {group: sorted(names[group]) for group in sorted(names)}


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse ``key=value`` words by Hydra's grammar. Raises ConfigError for what cannot be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if not text.startswith("~") and "=" not in text[1:]:
            raise ConfigError(f"'{text}' is not an override; write key=value")
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            why = str(error).splitlines()[0].partition(" expecting {")[0]  # ... twenty kinds of characters
            raise ConfigError(f"cannot read '{text}': {why}; put values with special characters in quotes") from error
    return parsed


def compose_tree(
    overrides: Sequence[str],
    config_dirs: Sequence[Path | str],
    defaults: dict[str, Any],
    start: Callable[[str], Mapping[str, Any]] | None = None,
) -> DictConfig:
    """``defaults``, the presets that ``overrides`` choose, then the single settings of ``overrides``; not yet resolved.

    start: called with the setting ``init``, if it is among ``overrides``; the groups that it gives take the place of
    what presets say, except for those which ``overrides`` choose.
    Raises ConfigError for words that cannot be read, groups and presets that do not exist, a choice of a model beside
    ``init``, and sweeps.
    """
    presets = Presets.find(config_dirs)
    groups = presets.groups()
    chosen, settings = [], []
    for override in parse(overrides):
        if override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}' is a sweep over several values; add -m to run it")
        if _is_group(override, groups):
            _check_preset(override, groups)
            chosen.append(str(override.input_line))
        else:
            settings.append(override)
    tree = OmegaConf.merge(OmegaConf.create(defaults), _compose(chosen, presets))
    assert isinstance(tree, DictConfig)
    init = next((o.value() for o in settings if o.key_or_group == "init"), None)
    if start is not None and isinstance(init, str):
        _bring(tree, start(init), init, [word.lstrip("+").split("=")[0].split("@")[0] for word in chosen])
    return apply_settings(tree, settings)


def _bring(tree: DictConfig, brought: Mapping[str, Any], init: str, chosen: Sequence[str]) -> None:
    """Lay what ``init`` brings over ``tree``, group by group; of ``data``, single settings."""
    for group in chosen:
        if group.split("/")[0] == "model":
            raise ConfigError(f"init={init} brings its model; take out {group}=..., single model.* settings may stay")
    for group, settings in brought.items():
        if group == "data":
            tree[group] = OmegaConf.merge(tree[group], settings)
        elif group not in chosen:
            tree[group] = settings


def apply_settings(tree: DictConfig, settings: Sequence[Override]) -> DictConfig:
    """Lay settings over ``tree``, in place: mappings are merged, anything else is replaced, ``~key`` is removed."""
    for override in settings:
        key = override.key_or_group
        try:
            if override.is_delete():
                _delete(tree, key)
            else:
                OmegaConf.update(tree, key, override.value(), merge=True, force_add=True)
        except ConfigError:
            raise
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"'{override.input_line}' cannot be applied: {why}") from error
    return tree


def resolve(tree: DictConfig) -> dict[str, Any]:
    """``tree`` as plain values with every ``${interpolation}`` filled in. Raises ConfigError where one has no value."""
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{where}{str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def refuse_presets(overrides: Sequence[Override]) -> None:
    """Raise ConfigError for overrides that choose presets, where a finished config is the base; ``~group`` takes one
    out."""
    groups = Presets.find().groups()
    for override in overrides:
        if override.is_sweep_override():
            raise ConfigError(
                f"'{override.input_line}' is a sweep over several values; a saved config takes single ones"
            )
        if _is_group(override, groups) and not override.is_delete():
            raise ConfigError(f"'{override.input_line}' chooses a preset; over a saved config, set single keys instead")


def expand_sweep(overrides: Sequence[str], config_dirs: Sequence[Path | str] = ()) -> Iterator[list[str]]:
    """Every combination of the sweeps in ``overrides``, as lists of plain overrides, the last key varying fastest.

    Takes Hydra's grammar: ``a=1,2``, ``a=range(1,4)``, ``a=choice(x,y)``, and ``model=glob(tiny*)`` over presets.
    """
    groups = Presets.find(config_dirs).groups()
    choices = [
        [f"{override.get_key_element()}={value}" for value in sweep_values(override, groups)]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in parse(overrides)
    ]
    for combination in itertools.product(*choices):
        yield list(combination)


def sweep_values(override: Override, groups: dict[str, list[str]]) -> list[str]:
    """The values of a sweep over single values, as words have them. Raises ConfigError: there are none, or it is an
    interval."""
    from hydra.core.override_parser.types import Glob

    value = override.value()
    if isinstance(value, Glob):
        found = list(value.filter(groups.get(override.key_or_group, [])))
    elif override.is_discrete_sweep():
        found = [str(element) for element in override.sweep_string_iterator()]
    else:
        raise ConfigError(
            f"'{override.input_line}' is an interval, which has no single values; use sweep.sampler=random or tpe, or "
            f"list the values: choice(...), range(...)"
        )
    if not found:
        raise ConfigError(f"'{override.input_line}' matches no {'preset' if isinstance(value, Glob) else 'value'}")
    return found


def nearest(name: str, known: Sequence[str]) -> str:
    """ "did you mean 'x'?", or the list of what is known when nothing is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def _is_group(override: Override, groups: dict[str, list[str]]) -> bool:
    key = override.key_or_group
    if key in groups or override.package is not None:
        return True
    if key in ("hydra/launcher", "hydra/sweeper"):
        raise ConfigError(f"{key} is not used here; sweep.sampler and sweep.launcher choose runs and where they start")
    if "/" in key:
        raise ConfigError(f"no group of presets is called '{key}'; {nearest(key, list(groups))}")
    return False


def _check_preset(override: Override, groups: dict[str, list[str]]) -> None:
    group = override.key_or_group
    if override.is_delete():
        return
    value = override.value()
    names = value if isinstance(value, list) else [value]
    known = groups.get(group, [])
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"'{override.input_line}': {group} takes the name of a preset ({', '.join(known)})")
        if name not in known:
            raise ConfigError(f"no preset of {group} is called '{name}'; {nearest(name, known)}")


def _compose(chosen: list[str], presets: Presets) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    root, *extra = presets.folders
    quoted = [QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in extra]
    search = [f"hydra.searchpath=[{','.join(quoted)}]"] if extra else []
    try:
        with initialize_config_dir(str(root), version_base="1.3"):
            tree = compose(PRIMARY, [*search, *chosen])
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    OmegaConf.set_struct(tree, False)
    return tree


def _delete(tree: DictConfig, key: str) -> None:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(tree, parent) if parent else tree
    if not isinstance(node, DictConfig) or last not in node:
        raise ConfigError(f"~{key}: there is no such setting to remove")
    del node[last]
