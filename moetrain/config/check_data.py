"""Checks of the data that need no text: names, weights, schedule, caps, packing."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import replace

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.config.schema_data import DataConfig, SourceConfig


def check_data(cfg: Config, resumed: bool = False) -> None:
    """Raises ConfigError for the first setting of the mixture that cannot be meant. resumed: of a run that has begun,
    where only the run tells which entry of the schedule comes first (``check_order``)."""
    _check_names(cfg.data)
    _check_weights(cfg.data)
    _check_domains(cfg.data)
    _check_schedule(cfg.data)
    if not resumed:
        check_order(cfg)
    data = cfg.data
    if data.packing == "best_fit" and not data.document_mask:
        raise ConfigError(
            "data.packing=best_fit puts documents side by side that must not see each other; set "
            "data.document_mask=true"
        )
    _check_objective(cfg)
    caps = [data.max_epochs, *(d.max_epochs for d in data.domains.values())]
    caps += [s.max_epochs for s in data.sources.values()]
    if data.exhausted == "stop" and all(cap is None for cap in caps):
        raise ConfigError(
            "data.exhausted=stop needs to know when data has run out; set data.max_epochs, 1 for one pass"
        )


def _check_objective(cfg: Config) -> None:
    data, parallel = cfg.data, cfg.parallel
    for name, tokens, count in (("fim.tokens", data.fim.tokens, 3), ("ul2.modes", data.ul2.modes, 3)):
        if len(set(tokens)) != count:
            raise ConfigError(f"data.{name} must be {count} different tokens, not {tokens}")
    if "{}" not in data.ul2.sentinel:
        raise ConfigError(f"data.ul2.sentinel='{data.ul2.sentinel}' needs {{}} where the number goes: <extra_id_{{}}>")
    if data.objective != "ul2":
        return
    if data.packing != "cut" or data.document_mask:
        raise ConfigError(
            "data.objective=ul2 corrupts whole windows; set data.packing=cut and data.document_mask=false"
        )
    if cfg.train.seq_len < 16:
        raise ConfigError(f"data.objective=ul2 needs train.seq_len of 16 or more, not {cfg.train.seq_len}")
    if parallel.cp != 1 and parallel.context != "all_to_all":
        raise ConfigError(
            f"data.objective=ul2 lets prefixes see ahead, which parallel.context={parallel.context} does not move; set "
            "parallel.context=all_to_all, or parallel.cp=1"
        )


def _check_weights(data: DataConfig) -> None:
    for group in ("sources", "domains"):
        for name, part in getattr(data, group).items():
            if part.weight is not None and not (math.isfinite(part.weight) and part.weight >= 0):
                raise ConfigError(f"data.{group}.{name}.weight={part.weight} must be a share of 0 or more")


def _check_names(data: DataConfig) -> None:
    """A weight for a source that there is not makes one without text."""
    empty = [
        n for n, s in data.sources.items() if replace(s, weight=None, max_epochs=None, domain=None) == SourceConfig()
    ]
    for name in empty:
        near = difflib.get_close_matches(name, [other for other in data.sources if other not in empty], n=1)
        if near:
            raise ConfigError(f"data.sources.{name} has no paths; did you mean '{near[0]}'?")


def _check_domains(data: DataConfig) -> None:
    members: dict[str, list[str]] = {}
    for name, source in data.sources.items():
        members.setdefault(source.domain or name, []).append(name)
    for name, domain in data.domains.items():
        if name not in members:
            raise ConfigError(f"data.domains.{name}: no source belongs to domain '{name}'; {_near(name, members)}")
        sources = {source: data.sources[source].weight for source in members[name]}
        if domain.weight is None:
            continue
        if len(sources) == 1 and None not in sources.values():
            raise ConfigError(
                f"data.domains.{name}.weight and data.sources.{members[name][0]}.weight both give the weight of domain "
                f"'{name}', which has one source; take out one of them"
            )
        if domain.weight > 0 and all(weight == 0 for weight in sources.values()):
            raise ConfigError(f"data.domains.{name}.weight={domain.weight:g}, but all its sources have weight 0")


def _check_schedule(data: DataConfig) -> None:
    known = {source.domain or name for name, source in data.sources.items()} | set(data.sources)
    for n, entry in enumerate(data.schedule):
        here = f"data.schedule[{n}]"
        if (entry.from_step is None) == (entry.from_tokens is None):
            raise ConfigError(f"{here} needs from_step or from_tokens, one of them")
        if not entry.weights:
            raise ConfigError(f"{here}.weights is empty; name the domains whose weights change")
        for name, weight in entry.weights.items():
            if name not in known:
                raise ConfigError(f"{here}.weights.{name}: no domain or source has this name; {_near(name, known)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"{here}.weights.{name}={weight} must be a share of 0 or more")


def first_samples(cfg: Config, step: int = 0, sample: int = 0) -> list[int]:
    """The sample from which each entry of the schedule holds, in a run whose step ``step`` begins with sample
    ``sample``. Of steps before it, which may have had another batch, they are below ``sample`` and no more is known."""
    return [
        -(-(entry.from_tokens or 0) // cfg.train.seq_len)
        if entry.from_step is None
        else sample + (entry.from_step - step) * cfg.train.global_batch
        for entry in cfg.data.schedule
    ]


def check_order(cfg: Config, step: int = 0, sample: int = 0) -> None:
    """Raise ConfigError where the schedule's entries to come do not begin one after the other. step, sample: as for
    ``first_samples``."""
    last = 0
    for n, first in enumerate(first_samples(cfg, step, sample)):
        if first <= last and max(first, last) >= sample:
            before = "the start, whose weights are those of the sources" if n == 0 else f"data.schedule[{n - 1}]"
            raise ConfigError(f"data.schedule[{n}] must begin later than {before}")
        last = first


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
