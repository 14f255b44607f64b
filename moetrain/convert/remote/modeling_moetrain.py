"""A decoder with mixture-of-experts layers, as moetrain trains it, in plain torch; remote code for transformers.

``m`` is the dict ``moetrain`` of config.json. Tensor names end in their shape: T tokens, B batch, S sequence, D model
width, F expert width, E experts, K experts of a token, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

from .configuration_moetrain import MoetrainConfig

TINY = 1e-20  # keeps sigmoid scores that all underflow from dividing by zero
LATENT_EPS = 1e-6  # epsilon of the norms of latents, whatever the model's is


def at(value: Any, layer: int) -> Any:
    """A setting of the MoE layers at ``layer``: one value, or one per layer."""
    return value[layer] if isinstance(value, list) else value


def is_moe(m: dict[str, Any], layer: int) -> bool:
    """Whether ``layer`` has experts."""
    after = layer - m["moe"]["first_dense"]
    return after >= 0 and (after + 1) % m["moe"]["every"] == 0 and at(m["moe"]["num_experts"], layer) > 0


def window_of(m: dict[str, Any], layer: int) -> int | None:
    """Tokens that ``layer`` attends to, itself included; None: all before it."""
    layers = m["attention"]["sliding_layers"]
    return m["attention"]["sliding_window"] if layers is None or layer in layers else None


def gelu(x: Tensor) -> Tensor:
    """Its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    """Clamped SwiGLU (arXiv 2508.10925)."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def swiglu_clamped(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU with DeepSeek-V4's limit."""
    return F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


# of gate and up, or of up alone
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "reglu": lambda gate, up: F.relu(gate) * up,
    "gpt_oss": gpt_oss,
    "swiglu_clamped": swiglu_clamped,
    "gelu": gelu,
    "relu2": lambda up: F.relu(up).square(),
}


def is_gated(activation: str) -> bool:
    """Whether an MLP with it has a gate."""
    return activation not in ("gelu", "relu2")


def in_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A router's logits, which have this precision in training too, whatever the rest has."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight)."""

    def __init__(self, dim: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset == 0:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide) + self.offset
        return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)


def mscale(factor: float, strength: float = 1.0) -> float:
    """YaRN's attention temperature of an extension by ``factor`` (arXiv 2309.00071)."""
    return 1.0 if factor <= 1.0 else 0.1 * strength * math.log(factor) + 1.0


def frequencies(rope: dict[str, Any], width: int) -> tuple[Tensor, float]:
    """(radians per token of each pair (width / 2,), factor on cos and sin)."""
    inv = 1.0 / (rope["theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    factor, original = rope["factor"], rope["original_max_seq_len"]
    if rope["scaling"] == "linear":
        return inv / factor, 1.0
    if rope["scaling"] == "llama3":
        turns = original * inv / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * inv / factor + smooth * inv, 1.0
    if rope["scaling"] == "yarn":
        low, high = (
            width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["theta"]))
            for turns in (rope["beta_fast"], rope["beta_slow"])
        )
        if rope["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        span = high - low or 0.001  # below 0 after a context so short that no frequency makes beta_slow rotations
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        inv = inv / factor * ramp + inv * (1 - ramp)
        if rope["mscale"] and rope["mscale_all_dim"]:
            return inv, mscale(factor, rope["mscale"]) / mscale(factor, rope["mscale_all_dim"])
        return inv, mscale(factor)
    return inv, 1.0


class Places:
    """Rotary tables, and which token sees which. positions_BS: (B, S). seen_BS: False for padding, or None. The layers
    that use them may be on other devices."""

    def __init__(self, m: dict[str, Any], positions_BS: Tensor, seen_BS: Tensor | None, dtype: torch.dtype) -> None:
        a = m["attention"]
        width = a["qk_rope_head_dim"] if a["kind"] == "mla" else int(a["head_dim"] * m["rope"]["fraction"])
        inv, factor = frequencies(m["rope"], width)
        angles = positions_BS[..., None, None].float() * inv.to(positions_BS.device)
        self.cos, self.sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        self.interleaved, self.seen_BS = m["rope"]["interleaved"], seen_BS

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate pairs of x (B, S, H, d): halves, or neighbours where ``interleaved``; these come out as halves.
        Elements beyond the tables' width stay as they are."""
        x, rest = x.tensor_split([2 * self.cos.shape[-1]], dim=-1)
        a, b = (x[..., 0::2], x[..., 1::2]) if self.interleaved else x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.device), self.sin.to(x.device)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    def mask(self, S: int, window: int | None) -> Tensor:
        """(B or 1, 1, S, S): True where a token (row) sees another (column)."""
        index = torch.arange(S, device=self.cos.device)
        behind = index[:, None] - index[None, :]
        mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
        mask = mask[None, None]
        if self.seen_BS is not None:  # a padding token sees itself, so that no row is empty
            mask = mask & self.seen_BS[:, None, None, :] | torch.eye(S, dtype=torch.bool, device=mask.device)
        return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, places: Places, window: int | None, scale: float, sinks_H: Tensor | None = None
) -> Tensor:
    """Causal attention of q, k, v (B, S, heads, width) -> (B, S, H * width of v)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    mask = places.mask(q.shape[2], window).to(q.device)
    if sinks_H is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:  # a learned logit per head that takes part in the softmax
        logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
        sinks = sinks_H.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        out = torch.cat((logits, sinks), -1).float().softmax(-1)[..., :-1].to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)


class GroupedQueryAttention(nn.Module):
    """arXiv 2305.13245, with what was asked for: biases, norms of queries and keys, clipping, sinks."""

    def __init__(self, m: dict[str, Any]) -> None:
        super().__init__()
        a, eps, offset = m["attention"], m["norm_eps"], m["norm_offset"]
        self.a = a
        q_dim, kv_dim = a["n_heads"] * a["head_dim"], a["n_kv_heads"] * a["head_dim"]
        self.wq = nn.Linear(m["dim"], q_dim, bias=a["qkv_bias"])
        self.wk = nn.Linear(m["dim"], kv_dim, bias=a["qkv_bias"])
        self.wv = nn.Linear(m["dim"], kv_dim, bias=a["qkv_bias"])
        self.wo = nn.Linear(q_dim, m["dim"], bias=a["out_bias"])
        if a["qk_norm"] != "none":
            by_head = a["qk_norm"] == "head"
            self.q_norm = RMSNorm(a["head_dim"] if by_head else q_dim, eps, offset)
            self.k_norm = RMSNorm(a["head_dim"] if by_head else kv_dim, eps, offset)
        self.sinks = nn.Parameter(torch.zeros(a["n_heads"])) if a["sinks"] else None
        self.router = nn.Linear(m["dim"], a["num_experts"], bias=False) if a["num_experts"] > 1 else None

    def forward(self, x_BSD: Tensor, places: Places, window: int | None) -> Tensor:
        a, clip = self.a, self.a["clip_qkv"]
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if a["qk_norm"] == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if clip is not None:
            q, k, v = (t.clamp(-clip, clip) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, a["head_dim"])) for t in (q, k, v))
        if a["qk_norm"] == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = places.rotate(q), places.rotate(k)
        scale = a["head_dim"] ** -0.5 if a["scale"] is None else a["scale"]
        out = attend(q, k, v, places, window, scale, self.sinks)
        if self.router is not None:
            shares_BSN = in_float32(x_BSD, self.router.weight).softmax(-1).to(out.dtype)
            out = (out.unflatten(-1, (a["n_heads"], -1)) * self.by_head(shares_BSN)).flatten(2)
        return self.wo(out)

    def by_head(self, shares_BSN: Tensor) -> Tensor:
        """(B, S, H, 1): how much each head counts, from what its expert does (BAM, arXiv 2408.08274)."""
        a = self.a
        groups = a["n_kv_heads"] if a["shared_kv"] else 1
        heads = a["n_heads"] // groups // a["num_experts"]
        return shares_BSN.repeat_interleave(heads, -1).repeat(1, 1, groups).unsqueeze(-1)


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads grow from one latent per token."""

    def __init__(self, m: dict[str, Any]) -> None:
        super().__init__()
        a, dim = m["attention"], m["dim"]
        self.a = a
        heads, qk_dim = a["n_heads"], a["qk_nope_head_dim"] + a["qk_rope_head_dim"]
        self.scale = qk_dim**-0.5
        if m["rope"]["scaling"] == "yarn" and m["rope"]["mscale_all_dim"]:
            self.scale *= mscale(m["rope"]["factor"], m["rope"]["mscale_all_dim"]) ** 2
        if a["q_lora_rank"] is None:
            self.wq = nn.Linear(dim, heads * qk_dim, bias=False)
        else:
            self.wq_a = nn.Linear(dim, a["q_lora_rank"], bias=False)
            self.q_norm = RMSNorm(a["q_lora_rank"], LATENT_EPS, m["norm_offset"])
            self.wq_b = nn.Linear(a["q_lora_rank"], heads * qk_dim, bias=False)
        self.wkv_a = nn.Linear(dim, a["kv_lora_rank"] + a["qk_rope_head_dim"], bias=False)
        self.kv_norm = RMSNorm(a["kv_lora_rank"], LATENT_EPS, m["norm_offset"])
        self.wkv_b = nn.Linear(a["kv_lora_rank"], heads * (a["qk_nope_head_dim"] + a["v_head_dim"]), bias=False)
        self.wo = nn.Linear(heads * a["v_head_dim"], dim, bias=False)

    def forward(self, x_BSD: Tensor, places: Places, window: int | None) -> Tensor:
        a = self.a
        n, r, v_dim, heads = a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["v_head_dim"], a["n_heads"]
        q = self.wq(x_BSD) if a["q_lora_rank"] is None else self.wq_b(self.q_norm(self.wq_a(x_BSD)))
        q_nope, q_rope = q.unflatten(-1, (heads, n + r)).split((n, r), -1)
        latent, k_rope = self.wkv_a(x_BSD).split((a["kv_lora_rank"], r), -1)
        k_nope, v = self.wkv_b(self.kv_norm(latent)).unflatten(-1, (heads, n + v_dim)).split((n, v_dim), -1)
        k_rope = places.rotate(k_rope.unsqueeze(2)).expand(-1, -1, heads, -1)
        q, k = torch.cat((q_nope, places.rotate(q_rope)), -1), torch.cat((k_nope, k_rope), -1)
        return self.wo(attend(q, k, v, places, window, self.scale))


class MLP(nn.Module):
    """With or without a gate inside; with ``scaled`` the output is scaled by the sigmoid of a learned gate."""

    def __init__(self, m: dict[str, Any], inner: int, scaled: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[m["activation"]]
        self.w_gate = nn.Linear(m["dim"], inner, bias=False) if is_gated(m["activation"]) else None
        self.w_up = nn.Linear(m["dim"], inner, bias=False)
        self.w_down = nn.Linear(inner, m["dim"], bias=False)
        self.gate = nn.Linear(m["dim"], 1, bias=False) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.w_down(self.activation(*[w(x) for w in (self.w_gate, self.w_up) if w is not None]))
        return out if self.gate is None else self.gate(x).sigmoid() * out


class Router(nn.Module):
    """A linear gate, scores, and the K best experts of each token."""

    def __init__(self, m: dict[str, Any], layer: int) -> None:
        super().__init__()
        self.o, self.top_k = m["router"], at(m["moe"]["top_k"], layer)
        experts = at(m["moe"]["num_experts"], layer)
        self.weight = nn.Parameter(torch.zeros(experts, m["dim"]))
        self.bias = nn.Parameter(torch.zeros(experts)) if self.o["logits_bias"] else None
        self.selection_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)  # chooses, and weighs nothing

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(weights_TK, ids_TK)."""
        o = self.o
        score = (lambda t: t.softmax(-1)) if o["score"] == "softmax" else torch.sigmoid
        logits_TE = in_float32(x_TD, self.weight, self.bias)
        first = o["order"] == "score_then_topk"
        scores_TE = score(logits_TE) if first else logits_TE
        chosen_by_TE = scores_TE + self.selection_bias.float()
        if o["n_groups"] > 1:
            groups_TGe = chosen_by_TE.unflatten(1, (o["n_groups"], -1))
            best_TG = groups_TGe.amax(-1) if o["group_score"] == "max" else groups_TGe.topk(2, -1).values.sum(-1)
            closed_TG = torch.ones_like(best_TG).scatter_(1, best_TG.topk(o["topk_groups"], -1).indices, 0).bool()
            chosen_by_TE = groups_TGe.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).flatten(1)
        ids_TK = chosen_by_TE.topk(self.top_k, -1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if not first:
            weights_TK = score(weights_TK)
        if o["renormalize"]:
            sum_T1 = weights_TK.sum(-1, keepdim=True)
            weights_TK = weights_TK / (sum_T1.clamp(min=o["min_sum"]) if o["min_sum"] else sum_T1 + TINY)
        return weights_TK * o["scale"], ids_TK


def ternary(w: Tensor) -> Tensor:
    """Each matrix of w (..., A, B) as its mean magnitude times -1, 0 or 1 (arXiv 2402.17764). Gradients pass."""
    wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))
    scale = wide.abs().mean((-2, -1), keepdim=True)
    rounded = (wide / scale.clamp(min=torch.finfo(wide.dtype).tiny)).round().clamp(-1, 1) * scale
    return rounded.to(w.dtype) + (w - w.detach())


class Experts(nn.Module):
    """w13 (E, n, F, D): the gate's weights, then up's, or up's alone. w2 (E, D, F)."""

    def __init__(self, m: dict[str, Any], layer: int) -> None:
        super().__init__()
        E, inner, D = at(m["moe"]["num_experts"], layer), at(m["moe"]["expert_dim"], layer), m["dim"]
        self.ternary = m["moe"]["ternary"]
        self.activation = ACTIVATIONS[m["moe"]["activation"]]
        self.n = 2 if is_gated(m["moe"]["activation"]) else 1
        self.w13 = nn.Parameter(torch.zeros(E, self.n, inner, D))
        self.w2 = nn.Parameter(torch.zeros(E, D, inner))
        self.b13 = nn.Parameter(torch.zeros(E, self.n, inner)) if m["moe"]["bias"] else None
        self.b2 = nn.Parameter(torch.zeros(E, D)) if m["moe"]["bias"] else None

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        for e in ids_TK.unique().tolist():
            token, place = (ids_TK == e).nonzero(as_tuple=True)
            b13, b2 = (None if b is None else b[e].flatten() for b in (self.b13, self.b2))
            w13, w2 = (ternary(w[e]) if self.ternary else w[e] for w in (self.w13, self.w2))
            inner = self.activation(*F.linear(x_TD[token], w13.flatten(0, 1), b13).chunk(self.n, -1))
            rows = F.linear(inner, w2, b2) * weights_TK[token, place, None].to(x_TD.dtype)
            out_TD.index_add_(0, token, rows)
        return out_TD


class MoE(nn.Module):
    """Routed experts beside shared ones."""

    def __init__(self, m: dict[str, Any], layer: int) -> None:
        super().__init__()
        shared = at(m["moe"]["shared_dim"], layer)
        self.router, self.experts = Router(m, layer), Experts(m, layer)
        self.shared = MLP(m, shared, m["moe"]["shared_gate"]) if shared else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        out_TD = self.experts(x_TD, *self.router(x_TD))
        return (out_TD if self.shared is None else out_TD + self.shared(x_TD)).view_as(x_BSD)


class Block(GradientCheckpointingLayer):  # type: ignore[misc]
    """x + attention(norm(x)), then x + mlp(norm(x)); or with each norm after what it is before here; or, parallel,
    x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, m: dict[str, Any], layer: int) -> None:
        super().__init__()
        self.window = window_of(m, layer)
        self.post, self.multiplier = m["norm_place"] == "post", m["residual_multiplier"]
        self.parallel = m["parallel_block"]
        self.attention_norm = RMSNorm(m["dim"], m["norm_eps"], m["norm_offset"])
        self.attention = LatentAttention(m) if m["attention"]["kind"] == "mla" else GroupedQueryAttention(m)
        self.mlp_norm = RMSNorm(m["dim"], m["norm_eps"], m["norm_offset"])
        self.mlp = None if is_moe(m, layer) else MLP(m, m["dense_dim"])
        self.moe = MoE(m, layer) if is_moe(m, layer) else None

    def forward(self, x_BSD: Tensor, places: Places) -> Tensor:
        mlp = self.mlp or self.moe
        assert mlp is not None
        if self.post:
            x_BSD = x_BSD + self.attention_norm(self.attention(x_BSD, places, self.window)) * self.multiplier
            return x_BSD + self.mlp_norm(mlp(x_BSD)) * self.multiplier
        y_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), places, self.window) * self.multiplier
        return y_BSD + mlp(self.mlp_norm(x_BSD if self.parallel else y_BSD)) * self.multiplier


class MoetrainForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The language model. It keeps no cache: generation computes the whole sequence for every token. Its loss is that
    of the next tokens alone: there is no auxiliary loss that keeps the experts balanced."""

    config_class = MoetrainConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["selection_bias"]  # noqa: RUF012

    def __init__(self, config: MoetrainConfig) -> None:
        super().__init__(config)
        m = config.moetrain
        self.embed = nn.Embedding(m["vocab_size"], m["dim"])
        self.layers = nn.ModuleList([Block(m, layer) for layer in range(m["n_layers"])])
        self.norm = RMSNorm(m["dim"], m["norm_eps"], m["norm_offset"])
        self.head = None if m["tie_embeddings"] else nn.Linear(m["dim"], m["vocab_size"], bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.moetrain["init_std"]
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Router | Experts):
            for p in module.parameters(recurse=False):
                if p.requires_grad and p.dim() > 1:
                    nn.init.normal_(p, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:  # type: ignore[override]
        table = super().resize_token_embeddings(*args, **kwargs)
        self.config.moetrain["vocab_size"] = len(table.weight)
        return table

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        """input_ids (B, S), or inputs_embeds (B, S, D), rows of the embedding; labels, with -100 for none, are shifted
        here. Returns logits (B, S, V), and the loss: the mean over labels, or the sum over ``num_items_in_batch``, the
        labels of all batches that make a step, which transformers' Trainer gives. The hidden states, where asked for,
        are those before each block, and the last one's after the final norm. ``return_dict=False``: as a tuple."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        m = self.config.moetrain
        x_BSD = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        x_BSD = x_BSD * x_BSD.new_tensor(m["embedding_multiplier"])  # rounded to its dtype
        seen_BS = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
            if seen_BS is not None:
                position_ids = (seen_BS.long().cumsum(-1) - 1).clamp(min=0)
        places = Places(m, position_ids, seen_BS, x_BSD.dtype)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[Tensor] = []
        for block in self.layers:
            states += [x_BSD] if wanted else []
            x_BSD = block(x_BSD, places)
        x_BSD = self.norm(x_BSD)
        h_BSD = x_BSD / m["logits_divisor"]
        table = self.embed.weight
        logits = F.linear(h_BSD.to(table.device), table) if self.head is None else self.head(h_BSD)
        loss = None
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            targets = labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction=how)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=(*states, x_BSD) if wanted else None)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
