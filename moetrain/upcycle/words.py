"""The words of ``moetrain upcycle``: those of every method, and a method's own options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config.errors import ConfigError
from moetrain.config.presets import nearest
from moetrain.config.registry import UPCYCLERS
from moetrain.config.typed import fields_of, type_name, validate
from moetrain.config.words import one_of, read_words, required, whole

USAGE = "moetrain upcycle method=NAME from=DIR[,DIR...] out=DIR [key=value ...]"
HELP = f"""usage: {USAGE}

Make a model with experts, of dense ones, or grow or shrink one. docs/upcycling.md tells more.

  method=NAME      how; see below
  from=DIR[,DIR]   the model or models to start from: Hugging Face folders, or runs and checkpoints of moetrain
  out=DIR          where the result goes: a folder that does not exist, or is empty
  to=FORM          hf (default); moetrain: a checkpoint for 'moetrain train init=DIR'; safetensors: one file
  optimizer=true   to=moetrain of a run or a checkpoint: take along AdamW's moments, for 'train init_optimizer=true'
  seed=N           of everything random (default 0)
  text=FILE[,FILE] text to measure losses on, and to see what models do (default: documentation of Python)
  tokens=N         how much of it, of all files together (default 2048)
  measure=false    print no losses: they need parents and result in memory, one after the other
"""
TOKENS = 2048
OWN = ("method", "from", "out", "seed", "text", "tokens", "measure", "to", "optimizer")


@dataclass(frozen=True)
class Asked:
    """The words of the command line, as HELP explains them. options: of the method's own class."""

    method: str
    parents: tuple[str, ...]
    out: Path
    options: Any
    seed: int = 0
    texts: tuple[Path, ...] = ()
    tokens: int = TOKENS
    measure: bool = True
    to: str = "hf"
    optimizer: bool = False


def parse(words: Sequence[str]) -> Asked:
    """Read words like "method=sparse". Raises ConfigError for one that is missing, unknown, or has no such value."""
    given = read_words("upcycle", words, None)
    required("upcycle", given, "method", "from", "out")
    try:
        entry = UPCYCLERS.get(given["method"])
    except ConfigError as error:
        raise ConfigError(f"method={given['method']}: {error}") from None
    settings = {name: _value(given[name]) for name in given if name not in OWN}
    known = [*fields_of(entry.options), *OWN]
    for name in settings:
        if name not in known:
            raise ConfigError(f"method={entry.name} has no setting '{name}'; {nearest(name, known)}")
    parents = tuple(part for part in given["from"].split(",") if part)
    texts = tuple(Path(part) for part in given["text"].split(",")) if "text" in given else ()
    for text in texts:
        if not text.is_file():
            raise ConfigError(f"text={text}: there is no such file")
    measure = one_of("upcycle", given, "measure", ("true", "false"))
    to = one_of("upcycle", given, "to", ("hf", "moetrain", "safetensors"))
    if to == "safetensors" and not given["out"].endswith(".safetensors"):
        raise ConfigError(f"to=safetensors writes one file, so out={given['out']} must end in .safetensors")
    optimizer = one_of("upcycle", given, "optimizer", ("false", "true")) == "true"
    if optimizer and to != "moetrain":
        raise ConfigError(f"optimizer=true goes with to=moetrain, not with to={to}")
    seed, tokens = whole("upcycle", given, "seed", 0, 0), whole("upcycle", given, "tokens", TOKENS, 2)
    options: Any = validate(entry.options, settings)
    return Asked(
        entry.name, parents, Path(given["out"]), options, seed, texts, tokens, measure == "true", to, optimizer
    )


def help_lines() -> Iterator[str]:
    """HELP, then every method with its options."""
    yield HELP
    for name in UPCYCLERS.names():
        options = UPCYCLERS.get(name).options
        yield f"method={name}: {(options.__doc__ or '').splitlines()[0]}"
        for key, field in fields_of(options).items():
            default = json.dumps(field.get_default(call_default_factory=True)).strip('"')
            yield f"  {key:16} {type_name(field.annotation, field.metadata)} = {default}: {field.description}"
        yield ""


def _value(text: str) -> Any:
    """A number, true, null or a list as JSON writes it; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
