"""Grouped-query attention (arXiv 2305.13245), whose heads may belong to several experts (BAM, arXiv 2408.08274)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config.schema import ModelConfig
from moetrain.model.attention.kernels import Core, Rule, attend
from moetrain.model.norm import RMSNorm
from moetrain.model.places import Places, rotate
from moetrain.moe.linear import Gather, Linear, all_here, local_part


class GroupedQueryAttention(nn.Module):
    """Causal attention with H query heads over G key/value heads of width d.

    Optional: biases, RMSNorm of queries and keys (per head: Qwen3; over all heads: OLMoE), clipping, sinks (GPT-OSS).

    With N experts, H/N heads are each one's, and what a head gives counts as much as the router says for its expert:
    the output projection then sums over the experts. Norms and the output's bias are common to them.
    own_heads: those of the H that this module computes.
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
        self.router = HeadRouter(cfg) if a.num_experts > 1 else None
        self.own_heads = slice(None)

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
        out = self.core(q, k, v, places, Rule(self.scale, window, sinks_H, self.backend))
        if self.router is not None:
            out = out * self.router(x_BSD)[..., self.own_heads, None].to(out.dtype)
        return self.wo(out.flatten(2))


class HeadRouter(nn.Module):
    """How much each head counts: a softmax over all N experts, for all of them work on every token (BAM).

    weight (N, D). Heads are in order of their experts; where these share G key/value heads, so are the H/G query heads
    of each. Computes in float32, or wider if its input is.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        a = cfg.attention
        self.groups = a.n_kv_heads if a.shared_kv else 1
        self.heads = a.n_heads // self.groups // a.num_experts
        self.weight = nn.Parameter(torch.empty(a.num_experts, cfg.dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """x_BSD -> weights_BSH."""
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        weights_BSN = F.linear(x_BSD.to(wide), self.weight.to(wide)).softmax(dim=-1)
        return weights_BSN.repeat_interleave(self.heads, dim=-1).repeat(1, 1, self.groups)
