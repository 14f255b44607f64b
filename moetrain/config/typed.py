"""From a plain tree to the typed Config: the schema's refusals, in words, and the options of registered kinds."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from moetrain.config import registry
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config

D = TypeVar("D")


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The fields of a pydantic dataclass, in order."""
    return cls.__pydantic_fields__  # type: ignore[attr-defined,no-any-return]


def registry_of(field: FieldInfo) -> registry.Registry | None:
    """The registry that a field of type ``Kind`` names, or None."""
    extra = field.json_schema_extra
    return getattr(registry, str(extra["registry"])) if isinstance(extra, dict) and "registry" in extra else None


def validate(cls: type[D], tree: dict[str, Any], path: str = "") -> D:
    """``tree`` as an instance of pydantic dataclass ``cls``; ``path`` is where it sits in the config, for messages.

    Types are strict (text is no number, true is no 1), except that 1e3 is an integer. Raises ConfigError for the first
    key that is unknown, naming the nearest known one, or else for the first value that does not fit.
    """
    tree = _whole_numbers(tree)
    try:
        # JSON mode is what lets mappings become dataclasses while all other types are strict.
        return TypeAdapter(cls).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "unexpected_keyword_argument"]
    raise ConfigError(_say(cls, tree, path, (unknown or problems)[0]))


def resolve_kinds(cfg: Config) -> None:
    """Replace, in place, the mappings in ``Kind`` fields by the options dataclasses of the entries that they name.

    Imports the registries' packages, and so torch. Raises ConfigError for unknown entries and options.
    """
    _resolve(cfg, "")
    for options in _options(cfg):
        check = getattr(options, "check", None)
        if check is not None:
            check(cfg)


def to_dict(value: Any) -> Any:
    """A config, or any part of it, as plain mappings, lists and numbers; ``kind`` keys are put back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields_to_dict(value)
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, list) else value


def type_name(annotation: Any, metadata: tuple[Any, ...] | list[Any] = ()) -> str:
    """A type as a reader of help and errors sees it: "int >= 1", "float or null", "one of: a, b"."""
    bounds = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    single = [each for m in metadata for each in getattr(m, "metadata", [m])]  # a Field of pydantic holds several
    limits = [f"{sign} {getattr(m, name)}" for m in single for name, sign in bounds.items() if hasattr(m, name)]
    bare, null, rest = _bare_type(annotation).partition(" or null")
    return bare + (" " if limits else "") + " and ".join(limits) + null + rest


def paths_of(cls: type, path: str = "") -> Iterator[str]:
    """Dotted paths of every field of the schema, groups included; options of registered kinds are not."""
    for name, field in fields_of(cls).items():
        here = f"{path}.{name}" if path else name
        yield here
        if dataclasses.is_dataclass(field.annotation):
            yield from paths_of(field.annotation, here)  # type: ignore[arg-type]


def _resolve(part: Any, path: str) -> None:
    for name, field in fields_of(type(part)).items():
        here, value = f"{path}.{name}" if path else name, getattr(part, name)
        kinds = registry_of(field)
        if kinds is None:
            if dataclasses.is_dataclass(value):
                _resolve(value, here)
        elif get_origin(field.annotation) is dict:
            setattr(part, name, {key: _entry_options(kinds, key, item, here) for key, item in value.items()})
        elif not dataclasses.is_dataclass(value):
            setattr(part, name, _kind_options(kinds, value, here))


def _kind_options(kinds: registry.Registry, value: Any, path: str) -> Any:
    """Options of the entry that ``value["kind"]`` names."""
    if not isinstance(value, dict):
        presets = path.replace(".", "/")
        raise ConfigError(f"{path} takes a group of settings, got {_show(value)}; choose a preset with {presets}=NAME")
    if "kind" not in value:
        raise ConfigError(f"{path}.kind is missing; known: {', '.join(kinds.names())}")
    rest = {key: item for key, item in value.items() if key != "kind"}
    entry = _named(kinds, value["kind"], f"{path}.kind={value['kind']}")
    return validate(entry.options, rest, path)


def _entry_options(kinds: registry.Registry, name: str, value: Any, path: str) -> Any:
    """Options of the entry called ``name``, where a mapping's keys are the names."""
    entry = _named(kinds, name, f"{path}.{name}")
    if dataclasses.is_dataclass(value):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{path}.{name} takes a group of settings, got {_show(value)}")
    return validate(entry.options, value, f"{path}.{name}")


def _named(kinds: registry.Registry, name: Any, where: str) -> registry.Entry:
    try:
        return kinds.get(str(name))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _options(part: Any) -> Iterator[Any]:
    """Every options dataclass below ``part``."""
    for name, field in fields_of(type(part)).items():
        value = getattr(part, name)
        if registry_of(field) is not None:
            yield from value.values() if isinstance(value, dict) else [value]
        elif dataclasses.is_dataclass(value):
            yield from _options(value)


def _fields_to_dict(part: Any) -> dict[str, Any]:
    tree = {}
    for name, field in fields_of(type(part)).items():
        value = getattr(part, name)
        tree[name] = to_dict(value)
        kinds = registry_of(field)
        if kinds is not None and dataclasses.is_dataclass(value):
            tree[name] = {"kind": kinds.entry_of(value).name, **tree[name]}
    return tree


def _whole_numbers(value: Any) -> Any:
    """1000.0 as 1000 everywhere, so that 1e3 can be given for an integer; float fields take integers anyway."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _say(cls: type, tree: dict[str, Any], path: str, problem: Any) -> str:
    """One line for one of pydantic's problems. Its location ends in type names that are no keys; those are left out."""
    node: Any = tree
    keys: list[str] = []
    parent: Any = cls
    field: FieldInfo | None = None
    for part in problem["loc"]:
        if isinstance(node, dict) and (part in node or str(part) in map(str, node)):
            node = node[part] if part in node else next(v for k, v in node.items() if str(k) == str(part))
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            break
        keys.append(str(part))
        inner = field.annotation if field is not None else cls
        if dataclasses.is_dataclass(inner):
            parent, field = inner, fields_of(inner).get(str(part))  # type: ignore[arg-type]
        elif get_origin(inner) is dict:
            field = FieldInfo.from_annotation(get_args(inner)[1])
    where = ".".join([path, *keys] if path else keys)
    if problem["type"] == "unexpected_keyword_argument":
        return _unknown(where, parent, tree, path)
    takes = type_name(field.annotation, field.metadata) if field is not None else "something else"
    quote = "; digits that are text need quotes: \"'...'\"" if _wants_text(problem, node) else ""
    return f"{where} takes {takes}; got {_show(node)}{quote}"


def _near(name: str, names: list[str], shown: list[str], cutoff: float) -> list[str]:
    """How the nearest of ``names`` is shown, if there is one."""
    return [shown[names.index(near)] for near in difflib.get_close_matches(name, names, n=1, cutoff=cutoff)]


def _unknown(where: str, parent: type, tree: dict[str, Any], path: str) -> str:
    group, _, name = where.rpartition(".")
    siblings = list(fields_of(parent))
    beside = [f"{group}.{sibling}" if group else sibling for sibling in siblings]
    known = {*paths_of(Config), *(_tree_paths(tree) if not path else ())}
    everywhere = [p for p in known if not p.startswith(where) and not where.startswith(p)]
    by_depth = sorted(everywhere, key=lambda p: (p.count("."), p))
    near = (
        _near(name, siblings, beside, cutoff=0.75)
        or [p for p in by_depth if p.rpartition(".")[2] == name]
        or _near(name, siblings, beside, cutoff=0.6)
        or difflib.get_close_matches(where, everywhere, n=1, cutoff=0.75)
    )
    if near:
        return f"{where} is not a setting; did you mean {near[0]}?"
    return f"{where} is not a setting; {group or 'the config'} has {', '.join(siblings) or 'none'}"


def _tree_paths(tree: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of a plain tree; these include the options that presets set."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        yield here
        if isinstance(value, dict):
            yield from _tree_paths(value, here)


def _wants_text(problem: Any, value: Any) -> bool:
    return problem["type"] == "string_type" and isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bare_type(annotation: Any) -> str:
    simple = {int: "int", float: "float", bool: "true or false", str: "text", type(None): "null", Any: "anything"}
    if annotation in simple:
        return simple[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_bare_type(a) for a in arguments)
    if origin is list:
        return f"list of {_bare_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_bare_type(arguments[0])} to {_bare_type(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return type_name(arguments[0], annotation.__metadata__)
    return "a group of settings" if dataclasses.is_dataclass(annotation) else str(annotation)
