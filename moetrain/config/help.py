"""Every field of the config with its type, default and description, for ``moetrain train --help``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moetrain.config.presets import Presets
from moetrain.config.schema import Config
from moetrain.config.typed import fields_of, registry_of, to_dict, type_name


@dataclass(frozen=True)
class Row:
    """One setting. ``path`` is what a user types before the equals sign."""

    path: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class Section:
    """Settings that belong together: a group, or the options of one registered kind."""

    path: str
    title: str
    rows: list[Row]


def sections(only: str = "") -> list[Section]:
    """Help on every setting whose path starts with ``only``; imports the registries."""

    def below(path: str) -> bool:
        return not only or path == only or path.startswith(f"{only}.")

    shown = []
    for section in _group("", Config, "settings of the run"):
        rows = [row for row in section.rows if below(row.path)]
        if rows or (not section.rows and below(section.path)):
            shown.append(Section(section.path, section.title, rows))
    return shown


def presets() -> list[Row]:
    """One row per group of presets: the override that chooses one, and the names."""
    return [Row(group, "preset", "", ", ".join(names)) for group, names in Presets.find().groups().items()]


def _group(path: str, cls: type, title: str) -> Iterator[Section]:
    rows: list[Row] = []
    below: list[Section] = []
    for name, field in fields_of(cls).items():
        here = f"{path}.{name}" if path else name
        kinds = registry_of(field)
        inner = _dataclass_of(field)
        if kinds is not None:
            below += list(_kinds(here, field))
        elif inner is not None:
            nested = here if inner is field.annotation else f"{here}.NAME"
            below += list(_group(nested, inner, field.description or ""))
        else:
            rows.append(
                Row(here, type_name(field.annotation, field.metadata), _default(field), field.description or "")
            )
    yield Section(path, f"{path}: {title}" if path else title, rows)
    yield from below


def _kinds(path: str, field: FieldInfo) -> Iterator[Section]:
    kinds = registry_of(field)
    assert kinds is not None
    by_name = get_origin(field.annotation) is dict
    if not by_name:
        default = field.get_default(call_default_factory=True)["kind"]
        row = Row(
            f"{path}.kind", "one of " + ", ".join(kinds.names()), default, f"which {kinds.what}; fixes the other keys"
        )
        yield Section(path, f"{path}: {field.description}", [row])
    for name in kinds.names():
        options = kinds.get(name).options
        prefix = f"{path}.{name}" if by_name else path
        rows = [
            Row(f"{prefix}.{key}", type_name(f.annotation, f.metadata), _default(f), f.description or "")
            for key, f in fields_of(options).items()
        ]
        doc = (options.__doc__ or "").strip().splitlines()
        title = f"{prefix}" if by_name else f"{path}.kind={name}"
        yield Section(prefix, f"{title}: {doc[0] if doc else kinds.what}", rows)


def _dataclass_of(field: FieldInfo) -> type | None:
    """The dataclass of a nested group, or of the values of a mapping of groups."""
    annotation: Any = field.annotation
    if get_origin(annotation) is dict:
        annotation = get_args(annotation)[1]
    return annotation if dataclasses.is_dataclass(annotation) else None  # type: ignore[return-value]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    return value if isinstance(value, str) and value else json.dumps(to_dict(value))
