"""Grouped-query attention (arXiv 2305.13245)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config.schema import ModelConfig
from moetrain.model.attention.kernels import attend
from moetrain.model.norm import RMSNorm
from moetrain.model.rope import rotate


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
        self.interleaved = cfg.rope.interleaved
        self.backend = a.backend
        q_dim, kv_dim = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        self.wq = nn.Linear(cfg.dim, q_dim, bias=a.qkv_bias)
        self.wk = nn.Linear(cfg.dim, kv_dim, bias=a.qkv_bias)
        self.wv = nn.Linear(cfg.dim, kv_dim, bias=a.qkv_bias)
        self.wo = nn.Linear(q_dim, cfg.dim, bias=a.out_bias)
        if a.qk_norm != "none":
            self.q_norm = RMSNorm(a.head_dim if a.qk_norm == "head" else q_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(a.head_dim if a.qk_norm == "head" else kv_dim, cfg.norm_eps)
        self.sinks = nn.Parameter(torch.empty(a.n_heads)) if a.sinks else None

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, mask_SS: Tensor | None) -> Tensor:
        """x_BSD -> (B, S, D). cos, sin: see ``rope.Positions``; mask_SS: see ``attend``."""
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin, self.interleaved), rotate(k, cos, sin, self.interleaved)
        out = attend(q, k, v, scale=self.head_dim**-0.5, mask_SS=mask_SS, sinks_H=self.sinks, backend=self.backend)
        return self.wo(out.flatten(2))
