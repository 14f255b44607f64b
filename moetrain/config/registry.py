"""Registries: the kinds of part that a config can name, each with the dataclass that types its options.

A new router (balance method, dispatcher, optimizer, model family ...) is one new file in the registry's package and one
preset; nothing else is edited, because a registry imports every module of its package before it answers.

Options are pydantic dataclasses (``config=fields.STRICT``) that hold the option fields alone, every field with a
default and a description; an entry without options has an empty one. The name of the entry is not among them: the
config's ``kind`` key (for ``balance``, the key of the mapping) picks the entry and is dropped, and
``entry_of(options)`` gives the entry back. So every entry has an options class of its own.

A class may define ``check(self, cfg: Config) -> None``, which raises ConfigError where the options do not fit the rest
of the config; ``config.load`` calls it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from moetrain.config.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True)
class Entry:
    """One registered kind: ``build`` is its class or function, ``options`` the pydantic dataclass of its settings."""

    name: str
    build: Any
    options: type


class Registry:
    """Named kinds of one part. ``package`` is imported, module by module, the first time that a name is looked up."""

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        self.package = package
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(self, name: str, options: type) -> Callable[[C], C]:
        """Decorator: make the class or function below known as ``name``, configured by dataclass ``options``."""

        def add(build: C) -> C:
            if name in self._entries and self._entries[name].build is not build:
                raise RuntimeError(f"{self.what} '{name}' is registered twice")
            if any(e.options is options and e.name != name for e in self._entries.values()):
                raise RuntimeError(f"{self.what} '{name}' needs an options class of its own, not {options.__name__}")
            self._entries[name] = Entry(name, build, options)
            return build

        return add

    def entry_of(self, options: object) -> Entry:
        """The entry whose options ``options`` are. Raises ConfigError where no entry declares that class."""
        self._load()
        for entry in self._entries.values():
            if type(options) is entry.options:
                return entry
        raise ConfigError(f"{type(options).__name__} holds the options of no {self.what}")

    def names(self) -> list[str]:
        """All known names, sorted."""
        self._load()
        return sorted(self._entries)

    def get(self, name: str) -> Entry:
        """The entry called ``name``. Raises ConfigError naming the nearest known one."""
        self._load()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(self._entries))}"
            raise ConfigError(f"no {self.what} is called '{name}'; {hint}")
        return self._entries[name]

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._loaded = True


ROUTERS = Registry("router", "moetrain.moe.routers")
BALANCE = Registry("balance method", "moetrain.moe.balance")
DISPATCHERS = Registry("dispatcher", "moetrain.moe.dispatch")
PLACEMENTS = Registry("placement of experts", "moetrain.moe.placement")
OPTIMIZERS = Registry("optimizer", "moetrain.optim.optimizers")
MIXERS = Registry("mixer", "moetrain.mixture.online")
FAMILIES = Registry("model family", "moetrain.convert.families")
UPCYCLERS = Registry("upcycling method", "moetrain.upcycle.methods")
