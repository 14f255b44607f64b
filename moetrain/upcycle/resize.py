"""What the methods share that take a model with experts and change how many there are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from moetrain.config.errors import ConfigError
from moetrain.config.registry import ROUTERS
from moetrain.config.schema import ModelConfig
from moetrain.moe.options import as_options
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle.method import Lazy, Model, check_sparse, check_top_k

# (layer, part, tensor with one entry for each expert) -> the same with the new number of experts. part: the name below
# the MoE layer, as "router.weight" or "experts.w13"
Change = Callable[[int, str, Tensor], Tensor]


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


def resized(cfg: ModelConfig, num_experts: int, top_k: int | None) -> ModelConfig:
    """``cfg`` with another number of experts. top_k: None: as it is. Raises ConfigError where there are too few."""
    K = int(cfg.layer_value("top_k", cfg.moe_layers()[0])) if top_k is None else top_k
    check_top_k(num_experts, K)
    old = cfg.moe.num_experts
    number = [num_experts if n else 0 for n in old] if isinstance(old, list) else num_experts
    return replace(cfg, moe=replace(cfg.moe, num_experts=number, top_k=K))


def with_changed(parent: Model, cfg: ModelConfig, change: Change) -> Model:
    """``parent`` as ``cfg``, with everything in it that has an entry for each expert put through ``change``."""

    def changed(name: str, layer: int, part: str) -> Tensor:
        return change(layer, part, parent.tensors[name])

    makers: dict[str, Callable[[], Tensor]] = {}
    for name in parent.tensors:
        found = re.fullmatch(r"layers\.(\d+)\.moe\.((?:router|experts)\..+)", name)
        if found:
            makers[name] = partial(changed, name, int(found[1]), found[2])
        else:
            makers[name] = partial(parent.tensors.__getitem__, name)
    return Model(cfg, Lazy(makers), "the result")
