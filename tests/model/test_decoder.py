"""What the decoder promises beside parity with transformers: recompute, losses, positions, meta builds, bad configs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moetrain.config import load
from moetrain.config.errors import ConfigError
from moetrain.config.schema import ExpertsConfig, ModelConfig, RopeConfig
from moetrain.model.attention.kernels import Rule, attend
from moetrain.model.count import count_parameters, flops_per_token
from moetrain.model.decoder import Decoder
from moetrain.model.init import init_rule
from moetrain.model.places import Places
from moetrain.model.rope import inverse_frequencies

TINY = ["tiny", "tiny-deepseek", "tiny-gpt-oss", "tiny-qwen2"]
AUX = {"aux_loss": {"coef": 0.01, "scope": "sequence"}, "z_loss": {"coef": 0.001}}


def tiny(name: str) -> ModelConfig:
    """The preset, narrowed so that a test takes a moment."""
    cfg = load([f"model={name}"]).model
    cfg.vocab_size, cfg.dim, cfg.n_layers = 97, 32, 2
    if cfg.attention.sliding_window is not None:
        cfg.attention.sliding_window, cfg.attention.sliding_layers = 5, [0]
    return cfg


def build(cfg: ModelConfig, balance: dict, dtype: torch.dtype = torch.float64) -> Decoder:
    """Built on the meta device and filled by ``init_rule``, as in a parallel run; std 0.2 so that routing varies."""
    with torch.device("meta"):
        model = Decoder(cfg, balance, ExpertsConfig()).to(dtype)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "reset_buffers"):
                module.reset_buffers()
        for fqn, p in model.named_parameters():
            kind, value = init_rule(fqn, cfg)
            p.fill_(value) if kind == "constant" else p.normal_(0, 10 * value, generator=generator)
    return model


def ids(cfg: ModelConfig, batch: int = 2, seq_len: int = 16) -> Tensor:
    return torch.randint(0, cfg.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TINY)
def test_recompute_changes_no_bit_of_loss_gradients_or_loads(name: str) -> None:
    cfg = tiny(name)
    tokens = ids(cfg)

    def step(recompute: str) -> tuple[Tensor, list[Tensor], list[Tensor], int]:
        model = build(cfg, AUX)
        for block in model.layers.values():
            block.recompute = recompute
        kept = {}  # storage -> bytes that backward holds on to, parameters included

        def keep(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss, carry = model(tokens, tokens.roll(-1, 1))
        total = loss / tokens.numel() + 0.1 * carry.aux_A.sum() / tokens.numel()
        total.backward()
        loads = [m.counts_E.clone() for m in model.modules() if hasattr(m, "counts_E")]
        return total.detach(), [p.grad for p in model.parameters()], loads, sum(kept.values())

    reference = step("none")
    assert all(g is not None for g in reference[1])
    least = reference[3]
    for recompute in ("selective", "full"):
        again = step(recompute)
        assert again[3] < least, f"{recompute} saves no memory"
        least = again[3]
        assert torch.equal(again[0], reference[0])
        assert all(torch.equal(a, b) for a, b in zip(again[1], reference[1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(again[2], reference[2], strict=True))


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    cfg = tiny("tiny")
    cfg.tie_embeddings = True
    model, tokens = build(cfg, {}), ids(cfg)
    targets = tokens.roll(-1, 1)
    targets[0, 3:7] = -100
    logits, _ = model(tokens)
    assert model.head is None and logits.shape == (2, 16, cfg.vocab_size)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 16)
    torch.testing.assert_close(model(tokens, targets, reduction="none")[0], each, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(tokens, targets)[0], each.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_only_the_past_and_only_relative_positions_matter(name: str) -> None:
    cfg = tiny(name)
    model, tokens = build(cfg, {}), ids(cfg)
    logits, _ = model(tokens)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % cfg.vocab_size
    torch.testing.assert_close(model(changed)[0][:, :9], logits[:, :9], rtol=1e-12, atol=1e-12)
    shifted = torch.arange(16).expand(2, 16) + torch.tensor([[0], [1000]])
    torch.testing.assert_close(model(tokens, positions_BS=shifted)[0], logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grouped", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_against_a_loop_over_queries(grouped: int, window: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 7, n, d, generator=g, dtype=torch.float64) for n, d in ((4, 6), (grouped, 6), (grouped, 5))
    )
    sinks = torch.randn(4, generator=g, dtype=torch.float64)
    expected = torch.zeros(2, 7, 4, 5, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for i in range(7):
                first = 0 if window is None else max(0, i - window + 1)
                kv = h * grouped // 4
                e = torch.exp(torch.stack([q[b, i, h] @ k[b, j, kv] * 0.3 for j in range(first, i + 1)]))
                expected[b, i, h] = (e @ v[b, first : i + 1, kv]) / (e.sum() + sinks[h].exp())
    places = Places(7)
    for backend in ("math", "sdpa"):
        out = attend(q, k, v, places, Rule(0.3, window, sinks, backend))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("scaling", "settings"),
    [
        ("linear", {"factor": 4.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("yarn", {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}),
        ("yarn", {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}),
    ],
)
def test_rope_scaling_is_transformers(scaling: str, settings: dict[str, float], truncate: bool) -> None:
    theirs = {"rope_type": scaling, "rope_theta": 1e4, "original_max_position_embeddings": 4096, "truncate": truncate}
    hf = AutoConfig.for_model("mixtral", head_dim=64, max_position_embeddings=163840, rope_parameters=theirs | settings)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling](hf)
    ours = RopeConfig(theta=1e4, scaling=scaling, original_max_seq_len=4096, truncate=truncate, **settings)
    inv, ours_factor = inverse_frequencies(ours, 64, torch.float32)
    torch.testing.assert_close(inv, expected, rtol=1e-6, atol=0)
    assert ours_factor == pytest.approx(factor, rel=1e-12)


def test_counts_and_flops_of_a_model_small_enough_to_count_by_hand() -> None:
    cfg = ModelConfig(vocab_size=10, dim=4, n_layers=2, dense_dim=5)
    cfg.attention.n_heads, cfg.attention.n_kv_heads, cfg.attention.head_dim = 2, 1, 2
    cfg.moe.num_experts, cfg.moe.top_k, cfg.moe.expert_dim, cfg.moe.first_dense = 3, 2, 6, 1
    attention, norms = 4 * 4 + 2 * (4 * 2) + 4 * 4, 2 * 4
    dense, expert, router = 3 * 4 * 5, 3 * 4 * 6, 3 * 4
    n = count_parameters(cfg)
    assert n.total == 2 * 10 * 4 + 4 + 2 * (attention + norms) + dense + router + 3 * expert
    assert n.active == n.total - expert
    assert (n.embedding, n.head) == (40, 40)
    assert n.matmul == 40 + 2 * attention + dense + router + 2 * expert
    seen = (1 + 2 + 3) / 3  # of 3 tokens, positions attended to on average
    assert flops_per_token(cfg, 3) == pytest.approx(3 * 2 * (n.matmul + 2 * 2 * (2 + 2) * seen))
    cfg.activation, cfg.moe.activation = "gelu", "relu2"  # one input matrix less
    assert count_parameters(cfg).total == n.total - dense // 3 - 3 * (expert // 3)


def test_bf16_is_bf16_throughout_and_near_float32() -> None:
    cfg = tiny("tiny-deepseek")
    model = build(cfg, AUX, torch.float32)
    tokens = ids(cfg)
    exact, carry = model(tokens, tokens.roll(-1, 1))
    loss, half_carry = model.bfloat16()(tokens, tokens.roll(-1, 1))
    assert model(tokens)[0].dtype == torch.bfloat16 and half_carry.aux_A.dtype == torch.float32
    assert math.isclose(loss.item(), exact.item(), rel_tol=0.02)
    torch.testing.assert_close(half_carry.aux_A, carry.aux_A, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (["model=tiny-deepseek", "model.attention.qkv_bias=true"], "qkv_bias"),
        (["model=tiny-deepseek", "model.attention.qk_norm=head"], "qk_norm"),
        (["model=tiny-deepseek", "model.attention.sinks=true"], "sinks"),
        (["model=tiny", "model.attention.sliding_layers=[0]"], "sliding_window"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused_in_one_line(settings: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as error, torch.device("meta"):
        Decoder(load(settings).model, {}, ExpertsConfig())
    assert "\n" not in str(error.value)
