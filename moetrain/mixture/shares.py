"""Weights of domains between configs and mixtures: what a config asks for, and which settings ask for a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moetrain.config import Config, to_dict
from moetrain.config.errors import ConfigError
from moetrain.config.schema_data import DataConfig
from moetrain.data.asked import ask, domains_of
from moetrain.data.manifest import Manifest


def refuse_changes(cfg: Config) -> None:
    """Raise ConfigError for a config whose weights change during the run: its loss belongs to no one mixture."""
    if cfg.data.schedule:
        raise ConfigError("data.schedule changes the weights during a run; runs of a mixture need constant ones")
    kind = to_dict(cfg)["mixer"]["kind"]
    if kind != "none":
        raise ConfigError(f"mixer={kind} changes the weights during a run; runs of a mixture need mixer=none")


def domain_shares(cfg: Config, manifest: Manifest) -> dict[str, float]:
    """Domain -> share of the training tokens that ``cfg`` asks for, of all its domains. Raises DataError."""
    of_sources = ask(cfg, {name: info.train.tokens for name, info in manifest.domains.items()}).phases[0].weights
    shares: dict[str, float] = {}
    for source, domain in domains_of(cfg.data).items():
        shares[domain] = shares.get(domain, 0.0) + of_sources[source]
    return shares


def ran_out(cfg: Config, manifest: Manifest, tokens: int) -> list[str]:
    """The sources whose share of ``tokens`` training tokens is more than their cap lets a run of ``cfg`` have."""
    sizes = {name: info.train.tokens for name, info in manifest.domains.items()}
    asked = ask(cfg, sizes)
    caps = {name: cap for name, cap in asked.max_epochs.items() if cap is not None and asked.exhausted != "repeat"}
    return [name for name, cap in caps.items() if asked.phases[0].weights[name] * tokens > cap * sizes[name]]


def setting_names(cfg: DataConfig, domains: Sequence[str]) -> dict[str, str]:
    """Domain -> what sets its weight: ``data.sources.NAME`` for a source that is alone, else ``data.domains.NAME``."""
    members: dict[str, list[str]] = {}
    for source, domain in domains_of(cfg).items():
        members.setdefault(domain, []).append(source)
    names = {}
    for domain in domains:
        group = cfg.domains.get(domain)
        alone = len(members[domain]) == 1 and (group is None or group.weight is None)
        names[domain] = f"data.sources.{members[domain][0]}" if alone else f"data.domains.{domain}"
    return names


def settings(names: Mapping[str, str], weights: Mapping[str, float]) -> list[str]:
    """Words for ``moetrain train``; ``names``: those of ``setting_names``."""
    return [f"{names[domain]}.weight={weight:.6g}" for domain, weight in weights.items()]


def preset(names: Mapping[str, str], weights: Mapping[str, float]) -> dict[str, Any]:
    """The same as the tree of a preset. Weights that are given hold instead of a rule."""
    data: dict[str, Any] = {"mixture": "given"}
    for domain, weight in weights.items():
        _, group, name = names[domain].split(".", 2)
        data.setdefault(group, {})[name] = {"weight": round(float(weight), 6)}
    return {"data": data}
