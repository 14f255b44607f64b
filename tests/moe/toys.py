"""Small MoE layers for the tests of this folder.

Returned as Any: tests reach deep into modules, whose attributes torch types as Tensor or Module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.config.schema import ExpertsConfig, ModelConfig, MoEConfig
from moetrain.moe.balance import aux_names
from moetrain.moe.build import build_moe_layer
from moetrain.moe.routers import build_router
from moetrain.moe.routing import Carry


def config(dim: int = 16, router: dict[str, Any] | None = None, **moe: Any) -> ModelConfig:
    """A model of width 16 with 8 experts of width 12, top-2, unless told otherwise. router: options of ``topk``."""
    moe = {"num_experts": 8, "top_k": 2, "expert_dim": 12, **moe}
    return ModelConfig(dim=dim, moe=MoEConfig(**moe), router={"kind": "topk", **(router or {})})


def make_layer(cfg: ModelConfig, balance: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A MoE layer with random weights, the same for the same config; experts run on the oracle, ``loop``."""
    layer = build_moe_layer(cfg, 0, balance or {}, ExpertsConfig(backend="loop")).to(dtype)
    return fill(layer, seed=1)


def make_router(cfg: ModelConfig, balance: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A router with random weights."""
    return fill(build_router(cfg, 0, balance or {}).to(dtype), seed=1)


def fill(module: Any, seed: int) -> Any:
    """Random parameters, with logits of order 1 so that routing is neither uniform nor certain."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5 if p.dim() > 1 else 0.2, generator=generator)
    return module


def tokens(n: int, dim: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """x_TD of n tokens."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def empty_carry(balance: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64) -> Carry:
    """The carry before the first layer."""
    return Carry(torch.zeros(len(aux_names(balance or {})), dtype=dtype))


def dense_weights(ids_TK: Tensor, weights_TK: Tensor, n_experts: int) -> Tensor:
    """weights_TE: a routing as a matrix, zero where an expert was not chosen."""
    return weights_TK.new_zeros(len(ids_TK), n_experts).scatter(1, ids_TK, weights_TK)
