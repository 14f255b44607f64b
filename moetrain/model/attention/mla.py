"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config.schema import ModelConfig
from moetrain.model.attention.kernels import Core, Rule, attend
from moetrain.model.norm import RMSNorm
from moetrain.model.places import Places, rotate
from moetrain.model.rope import yarn_mscale
from moetrain.moe.linear import Gather, Linear, all_here

# DeepSeek's code leaves the norms of the latents at RMSNorm's default, whatever the model's epsilon is.
LATENT_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of H heads grow from one small latent per token; a rotated key part is shared by all heads.

    A head's query and key are [not rotated (n), rotated (r)]; its value has width v. Queries may have a latent too.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        a = cfg.attention
        self.n_heads = a.n_heads
        self.nope_dim, self.rope_dim, self.v_dim = a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
        self.kv_rank = a.kv_lora_rank
        self.interleaved = cfg.rope.interleaved
        self.backend = a.backend
        self.core: Core = attend
        self.gather: Gather = all_here
        qk_dim = self.nope_dim + self.rope_dim
        self.scale = qk_dim**-0.5
        if cfg.rope.scaling == "yarn" and cfg.rope.mscale_all_dim:
            self.scale *= yarn_mscale(cfg.rope.factor, cfg.rope.mscale_all_dim) ** 2
        if a.q_lora_rank is None:
            self.wq = Linear(cfg.dim, a.n_heads * qk_dim, bias=False)
        else:
            self.wq_a = Linear(cfg.dim, a.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(a.q_lora_rank, LATENT_EPS, cfg.norm_offset)
            self.wq_b = Linear(a.q_lora_rank, a.n_heads * qk_dim, bias=False)
        self.has_q_latent = a.q_lora_rank is not None
        self.wkv_a = Linear(cfg.dim, a.kv_lora_rank + self.rope_dim, bias=False)
        self.kv_norm = RMSNorm(a.kv_lora_rank, LATENT_EPS, cfg.norm_offset)
        self.wkv_b = Linear(a.kv_lora_rank, a.n_heads * (self.nope_dim + self.v_dim), bias=False)
        self.wo = Linear(a.n_heads * self.v_dim, cfg.dim, bias=False)

    def forward(self, x_BSD: Tensor, places: Places, window: int | None) -> Tensor:
        """x_BSD -> (B, S, D). window: see ``attend``."""
        query = self.q_norm(self.wq_a(x_BSD)) if self.has_q_latent else x_BSD
        latent, k_rope = self.wkv_a(x_BSD).split((self.kv_rank, self.rope_dim), -1)
        query, latent, k_rope = self.gather(query, self.kv_norm(latent), k_rope)
        q = self.wq_b(query) if self.has_q_latent else self.wq(query)
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope_dim + self.rope_dim)).split((self.nope_dim, self.rope_dim), -1)
        kv = self.wkv_b(latent).unflatten(-1, (-1, self.nope_dim + self.v_dim))
        k_nope, v = kv.split((self.nope_dim, self.v_dim), -1)
        q_rope = rotate(q_rope, places, self.interleaved)
        k_rope = rotate(k_rope.unsqueeze(2), places, self.interleaved).expand(-1, -1, k_nope.shape[2], -1)
        q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1)
        out = self.core(q, k, v, places, Rule(self.scale, window, backend=self.backend))
        return self.wo(out.flatten(2))
