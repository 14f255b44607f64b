"""What would do instead: settings that mend a broken rule, found by trying them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.config.sizes import DENSE_GRID, Sizes, near, resolve_sizes


@dataclass(frozen=True)
class Broken:
    """A rule that a mapping breaks.

    says: the rule, with the sizes. change: settings that could mend it, each with the values to try; numbers are
    ascending.
    """

    says: str
    change: Mapping[str, Sequence[Any]] = field(default_factory=dict)


Rule = Callable[[Config, Sizes], Iterator[Broken]]


def first_broken(rules: Iterable[Rule], cfg: Config, sizes: Sizes) -> tuple[Rule, Broken] | None:
    """The first of ``rules`` that ``cfg`` breaks under ``sizes``."""
    for rule in rules:
        for broken in rule(cfg, sizes):
            return rule, broken
    return None


def enforce(rules: Sequence[Rule], cfg: Config, sizes: Sizes) -> None:
    """Raises ConfigError for the first of ``rules`` that is broken, with the nearest choices that mend it."""
    found = first_broken(rules, cfg, sizes)
    if found is not None:
        rule, broken = found
        raise ConfigError(f"{broken.says}; {_advice(rules, rule, broken, cfg, sizes)}")


def setting(cfg: Config, key: str) -> Any:
    """The value of the setting with dotted path ``key``."""
    part: Any = cfg
    for name in key.split("."):
        part = part[name] if isinstance(part, dict) else getattr(part, name)
    return part


def with_setting(cfg: Config, key: str, value: Any) -> Config:
    """A copy of ``cfg`` in which the setting with dotted path ``key`` is ``value``; it is not validated."""
    return _replaced(cfg, key.split("."), value)


def _replaced(part: Any, names: Sequence[str], value: Any) -> Any:
    name, rest = names[0], names[1:]
    new = copy.copy(part)
    if isinstance(new, dict):
        new[name] = _replaced(part[name], rest, value) if rest else value
    else:
        setattr(new, name, _replaced(getattr(part, name), rest, value) if rest else value)
    return new


def _advice(rules: Sequence[Rule], rule: Rule, broken: Broken, cfg: Config, sizes: Sizes) -> str:
    """The nearest values of each setting that break no rule at all; where there are none, those that mend ``rule``,
    and at last those that mend it once another size changes along."""
    if not all(_is_told(cfg, key) for key in broken.change):
        return f"change {' or '.join(broken.change)}"
    for mends, free in ((rules, False), ([rule], False), ([rule], True)):
        choices = []
        for key, values in broken.change.items():
            legal = [v for v in values if _legal(mends, cfg, sizes, key, v, free)]
            choices += [f"{key}={_word(v)}" for v in _nearest(_current(cfg, sizes, key), legal)]
        if choices:
            return f"nearest legal: {' or '.join(choices)}"
    return f"no other {' or '.join(broken.change)} is legal"


def _is_told(cfg: Config, key: str) -> bool:
    """Whether ``cfg`` has the setting ``key``: once a registry's options are made, they no longer tell their kind."""
    try:
        setting(cfg, key)
    except AttributeError:
        return False
    return True


def _current(cfg: Config, sizes: Sizes, key: str) -> Any:
    """The value in force: of a size, the inferred one."""
    group, _, name = key.rpartition(".")
    is_size = group == "parallel" and hasattr(sizes, name)
    return getattr(sizes, name) if is_size else setting(cfg, key)


def _legal(rules: Sequence[Rule], cfg: Config, sizes: Sizes, key: str, value: Any, free: bool) -> bool:
    """Whether no rule is broken with ``key`` at ``value``. free: the product of the sizes need not be the world."""
    changed = with_setting(cfg, key, value)
    group, _, name = key.rpartition(".")
    if group == "parallel":
        try:
            sizes = resolve_sizes(changed.parallel, sizes.world)
        except ConfigError:
            if not free or name not in DENSE_GRID:
                return False
            sizes = dataclasses.replace(sizes, **{name: value})
    return first_broken(rules, changed, sizes) is None


def _nearest(current: Any, legal: Sequence[Any]) -> Sequence[Any]:
    """Of numbers the nearest on both sides; of anything else the first two."""
    if isinstance(current, int) and not isinstance(current, bool):
        return near(current, legal)
    return [value for value in legal if value != current][:2]


def _word(value: Any) -> str:
    """``value`` as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
