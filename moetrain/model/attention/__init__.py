"""Attention: grouped-query and multi-head latent, over one kernel interface."""

from __future__ import annotations

from torch import nn

from moetrain.config.errors import ConfigError
from moetrain.config.schema import ModelConfig
from moetrain.model.attention.gqa import GroupedQueryAttention
from moetrain.model.attention.mla import MultiHeadLatentAttention


def build_attention(cfg: ModelConfig) -> nn.Module:
    """The attention module of a block; called with (x_BSD, places, window), returns (B, S, D)."""
    return MultiHeadLatentAttention(cfg) if cfg.attention.kind == "mla" else GroupedQueryAttention(cfg)


def rotated_width(cfg: ModelConfig) -> int:
    """Width of the rotated part of a head."""
    if cfg.attention.kind == "mla":
        return cfg.attention.qk_rope_head_dim
    return int(cfg.attention.head_dim * cfg.rope.fraction)


def window_of(cfg: ModelConfig, layer: int) -> int | None:
    """Tokens that decoder layer ``layer`` attends to, itself included; None: all before it."""
    a = cfg.attention
    if a.sliding_layers is not None:
        if a.sliding_window is None:
            raise ConfigError("model.attention.sliding_layers is set, but sliding_window is not")
        if layer not in a.sliding_layers:
            return None
    return a.sliding_window
