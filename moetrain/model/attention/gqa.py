"""Grouped-query attention (arXiv 2305.13245)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config.schema import ModelConfig
from moetrain.model.attention.kernels import Core, attend
from moetrain.model.norm import RMSNorm
from moetrain.model.places import Places, rotate
from moetrain.moe.linear import Gather, Linear, all_here, local_part


class GroupedQueryAttention(nn.Module):
    """Causal attention with H query heads over G key/value heads of width d.

    Optional: biases, RMSNorm of queries and keys (per head: Qwen3; over all heads: OLMoE), clipping, sinks (GPT-OSS).
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        a = cfg.attention
        self.head_dim = a.head_dim
        self.qk_norm = a.qk_norm
        self.clip = a.clip_qkv
        self.scale = a.score_scale()
        self.interleaved = cfg.rope.interleaved
        self.backend = a.backend
        self.core: Core = attend
        self.gather: Gather = all_here
        q_dim, kv_dim = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        self.wq = Linear(cfg.dim, q_dim, bias=a.qkv_bias)
        self.wk = Linear(cfg.dim, kv_dim, bias=a.qkv_bias)
        self.wv = Linear(cfg.dim, kv_dim, bias=a.qkv_bias)
        self.wo = Linear(q_dim, cfg.dim, bias=a.out_bias)
        if a.qk_norm != "none":
            self.q_norm = RMSNorm(a.head_dim if a.qk_norm == "head" else q_dim, cfg.norm_eps, cfg.norm_offset)
            self.k_norm = RMSNorm(a.head_dim if a.qk_norm == "head" else kv_dim, cfg.norm_eps, cfg.norm_offset)
        self.sinks = nn.Parameter(torch.empty(a.n_heads)) if a.sinks else None

    def forward(self, x_BSD: Tensor, places: Places, window: int | None) -> Tensor:
        """x_BSD -> (B, S, D). window: see ``attend``."""
        (x_BSD,) = self.gather(x_BSD)
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, places, self.interleaved), rotate(k, places, self.interleaved)
        sinks_H = local_part(self.sinks)
        out = self.core(q, k, v, places, window, scale=self.scale, sinks_H=sinks_H, backend=self.backend)
        return self.wo(out.flatten(2))
