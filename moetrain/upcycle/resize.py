"""What the methods share that take a model with experts and change how many there are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from moetrain.checkpoint.weights import Box
from moetrain.config.errors import ConfigError
from moetrain.config.registry import ROUTERS
from moetrain.config.schema import ModelConfig
from moetrain.moe.options import as_options
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle.method import Made, Model, check_sparse, check_top_k, stacked

# (layer, the parent's tensor with an entry for each expert, number of a new expert) -> its entry
Entry = Callable[[int, str, int], Tensor]


def check_resizable(parent: Model, method: str) -> TopKOptions:
    """The options of ``parent``'s router. Raises ConfigError unless all its MoE layers are alike, and its router has
    independent experts: one row for each, and no groups."""
    check_sparse(parent, method)
    options = as_options(ROUTERS, parent.cfg.router)
    if not isinstance(options, TopKOptions):
        kind = ROUTERS.entry_of(options).name
        raise ConfigError(f"method={method} knows routers of kind topk; {parent.where} has {kind}")
    if options.n_groups > 1:
        raise ConfigError(f"method={method}: {parent.where} chooses by n_groups={options.n_groups} groups of experts")
    return options


def experts_of(cfg: ModelConfig) -> int:
    """How many experts each MoE layer has."""
    return int(cfg.layer_value("num_experts", cfg.moe_layers()[0]))


def check_fewer(parent: Model, num_experts: int) -> None:
    """Raise ConfigError where ``parent`` has not even ``num_experts``."""
    E = experts_of(parent.cfg)
    if num_experts > E:
        raise ConfigError(f"num_experts={num_experts}: {parent.where} has only {E}; grow it with method=grow")


def resized(cfg: ModelConfig, num_experts: int, top_k: int | None) -> ModelConfig:
    """``cfg`` with another number of experts. top_k: None: as it is. Raises ConfigError where there are too few."""
    K = int(cfg.layer_value("top_k", cfg.moe_layers()[0])) if top_k is None else top_k
    check_top_k(num_experts, K)
    old = cfg.moe.num_experts
    number = [num_experts if n else 0 for n in old] if isinstance(old, list) else num_experts
    return replace(cfg, moe=replace(cfg.moe, num_experts=number, top_k=K))


def with_entries(parent: Model, cfg: ModelConfig, entry: Entry) -> Model:
    """``parent`` as ``cfg``: whatever of it has an entry for each expert gets those that ``entry`` makes."""

    def made(layer: int, name: str, box: Box) -> Tensor:
        return stacked(lambda e: entry(layer, name, e), box)

    specs = dict(parent.source.specs)
    makers: dict[str, Callable[[Box], Tensor]] = {}
    for name, spec in specs.items():
        found = re.fullmatch(r"layers\.(\d+)\.moe\.(router|experts)\..+", name)
        makers[name] = partial(parent.source.read, name)
        if found:
            specs[name] = replace(spec, shape=(experts_of(cfg), *spec.shape[1:]))
            makers[name] = partial(made, int(found[1]), name)
    return Model(cfg, Made(specs, makers), "the result")
