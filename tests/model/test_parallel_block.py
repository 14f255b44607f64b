"""Parallel blocks, attention and MLP from the same input, against transformers' GPT-NeoX."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from moetrain.config import load
from moetrain.moe.routing import Memo, TokenContext
from tests.model.hf_models import float64_throughout
from tests.model.test_decoder import build, ids, tiny


def neox(vocab: int) -> GPTNeoXForCausalLM:
    """transformers' GPT-NeoX, random, with Llama's norms and MLPs for those that we do not have: what its layers do
    with their parts is its own."""
    config = GPTNeoXConfig(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           rotary_pct=0.5, max_position_embeddings=64, attn_implementation="eager")  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    parts = LlamaConfig(hidden_size=32, intermediate_size=48)
    for layer in model.gpt_neox.layers:
        layer.input_layernorm, layer.post_attention_layernorm = LlamaRMSNorm(32), LlamaRMSNorm(32)
        layer.mlp = LlamaMLP(parts)
    model.gpt_neox.final_layer_norm = LlamaRMSNorm(32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model.double().eval()


def by_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-NeoX's tensors, or their gradients, as ours. Its queries, keys and values are together, head by head."""
    ours = {
        "embed.weight": theirs["gpt_neox.embed_in.weight"],
        "norm.weight": theirs["gpt_neox.final_layer_norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for i in range(2):
        here, there = f"layers.{i}.", f"gpt_neox.layers.{i}."
        for kind in ("weight", "bias"):
            qkv = theirs[f"{there}attention.query_key_value.{kind}"].unflatten(0, (4, 3, 8))
            for p, t in zip("qkv", qkv.unbind(1), strict=True):
                ours[f"{here}attention.w{p}.{kind}"] = t.flatten(0, 1)
            ours[f"{here}attention.wo.{kind}"] = theirs[f"{there}attention.dense.{kind}"]
        ours[f"{here}attention_norm.weight"] = theirs[f"{there}input_layernorm.weight"]
        ours[f"{here}mlp_norm.weight"] = theirs[f"{there}post_attention_layernorm.weight"]
        for p in ("gate", "up", "down"):
            ours[f"{here}mlp.w_{p}.weight"] = theirs[f"{there}mlp.{p}_proj.weight"]
    return ours


def test_logits_and_gradients_are_those_of_gpt_neox() -> None:
    cfg = load(
        ["model=tiny", "model.dim=32", "model.n_layers=2", "model.dense_dim=48", "model.vocab_size=97",
         "model.attention.n_heads=4", "model.attention.n_kv_heads=4", "model.attention.head_dim=8",
         "model.attention.qk_norm=none", "model.attention.qkv_bias=true", "model.attention.out_bias=true",
         "model.rope.fraction=0.5", "model.moe.num_experts=0", "model.parallel_block=true", "balance=[]",
         "data.tokenizer.vocab_size=97"]
    ).model  # fmt: skip
    tokens = ids(cfg)
    targets = tokens.roll(-1, 1)
    with float64_throughout():
        theirs = neox(97)
        want = theirs(tokens).logits
        F.cross_entropy(want.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours = build(cfg, {})
    ours.load_state_dict(by_our_names(theirs.state_dict()))
    torch.testing.assert_close(ours(tokens)[0], want, rtol=1e-9, atol=1e-9)
    ours(tokens, targets)[0].backward()
    gradients = by_our_names({name: p.grad for name, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-9, msg=name)


def test_experts_read_what_attention_reads() -> None:
    """A MoE block is x + attention(norm(x)) + experts(norm(x)), the parts called one by one."""
    cfg = tiny("tiny")
    cfg.parallel_block, cfg.residual_multiplier = True, 0.5
    model = build(cfg, {})
    block = model.layers["0"]
    x = torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places, carry = model.places(x, 16), model.first_carry(x)
    out, _ = block(x, carry, places, 0)
    attention = block.attention(block.attention_norm(x), places, None)
    experts, _ = block.moe(block.mlp_norm(x).flatten(0, 1), carry, TokenContext(16, 0, False, Memo()))
    torch.testing.assert_close(out, x + (attention + experts.view_as(x)) / 2, rtol=1e-12, atol=1e-12)
