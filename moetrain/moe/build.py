"""One MoE layer from a config, for one process; ``parallel.apply`` spreads it over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrain.config.schema import ExpertsConfig, ModelConfig
from moetrain.moe.dispatch import build_dispatcher
from moetrain.moe.experts import Experts, SharedExperts
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import build_router


def build_moe_layer(cfg: ModelConfig, layer: int, balance: Mapping[str, Any], experts_cfg: ExpertsConfig) -> MoELayer:
    """The MoE layer of decoder layer ``layer`` (0-based), with all experts and the local dispatcher.

    balance: name -> options of the balance methods. Parameters are not initialised. Raises ConfigError for an unknown
    kind or setting.
    """
    router = build_router(cfg, layer, balance)
    return MoELayer(
        router=router,
        dispatcher=build_dispatcher({"kind": "local"}, router.n_experts, None),
        experts=Experts(cfg, layer, experts_cfg.backend, experts_cfg.fp8),
        shared=SharedExperts(cfg, layer) if cfg.layer_value("shared_dim", layer) else None,
    )
