"""The ``name=value`` words of commands that are not settings of a run."""

from __future__ import annotations

from collections.abc import Sequence

from moetrain.config.errors import ConfigError
from moetrain.config.presets import nearest


def read_words(command: str, words: Sequence[str], known: Sequence[str] | None) -> dict[str, str]:
    """``words`` like "seed=1" by their names. Raises ConfigError for one that is unknown (``known`` None: none is) or
    given twice."""
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"{command}: '{word}' is no word of it; write name=value, see 'moetrain {command} --help'"
            )
        if known is not None and name not in known:
            raise ConfigError(f"{command} takes no {name}=; {nearest(name, known)}")
        if name in given:
            raise ConfigError(f"{command}: {name}= is given twice")
        given[name] = value
    return given


def path_and_words(command: str, words: Sequence[str], known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The first word, a path, and the others; see ``read_words``."""
    if not words or words[0].partition("=")[0] in known:
        raise ConfigError(f"{command} takes a path first; see 'moetrain {command} --help'")
    return words[0], read_words(command, words[1:], known)


def whole(command: str, given: dict[str, str], name: str, default: int, least: int = 1) -> int:
    """The whole number that ``given`` has for ``name``. Raises ConfigError for less than ``least``."""
    value = given.get(name, str(default))
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise ConfigError(f"{command}: {name}= takes a whole number of {least} or more; got '{value}'")
    return int(value)


def real(command: str, given: dict[str, str], name: str, default: float, low: float, high: float) -> float:
    """The number that ``given`` has for ``name``. Raises ConfigError unless low <= number <= high."""
    value = given.get(name, str(default))
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise ConfigError(f"{command}: {name}= takes a number from {low:g} to {high:g}; got '{value}'")
    return number


def required(command: str, given: dict[str, str], *names: str) -> None:
    """Raises ConfigError unless ``given`` has a value for all ``names``."""
    for name in names:
        if not given.get(name):
            raise ConfigError(f"{command} needs {name}=; see 'moetrain {command} --help'")


def one_of(command: str, given: dict[str, str], name: str, allowed: Sequence[str]) -> str:
    """What ``given`` has for ``name``, or the first that is allowed. Raises ConfigError for another."""
    value = given.get(name, allowed[0])
    if value not in allowed:
        raise ConfigError(f"{command}: {name}={value} is not known; {nearest(value, allowed)}")
    return value
