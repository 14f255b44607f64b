"""The whole layer on one rank equals transformers' MoE blocks, and a formula written token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moetrain.config.schema import ExpertsConfig
from moetrain.moe.build import build_moe_layer
from moetrain.moe.routing import TokenContext
from tests.moe.toys import config, empty_carry, fill, make_layer, tokens

D, F, E, K, B, S = 16, 12, 8, 2, 3, 7


def mixtral() -> tuple[Any, Any]:
    hf: Any = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    )
    return hf, layer_like(hf, {})


def qwen2() -> tuple[Any, Any]:
    hf: Any = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=D,
            moe_intermediate_size=F,
            num_experts=E,
            num_experts_per_tok=K,
            shared_expert_intermediate_size=20,
            norm_topk_prob=False,
        )
    )
    ours = layer_like(hf, {"renormalize": False}, shared_dim=20, shared_gate=True)
    copy_shared(ours, hf.shared_expert)
    ours.shared.gate.weight.data.copy_(hf.shared_expert_gate.weight)
    return hf, ours


def deepseek_v3() -> tuple[Any, Any]:
    hf: Any = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=D,
            moe_intermediate_size=F,
            n_routed_experts=E,
            num_experts_per_tok=K,
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
        )
    )
    options = {"score": "sigmoid", "scale": 2.5, "n_groups": 4, "topk_groups": 2}
    ours = layer_like(hf, options, shared_dim=2 * F)
    copy_shared(ours, hf.shared_experts)
    return hf, ours


def gpt_oss() -> tuple[Any, Any]:
    hf: Any = GptOssMLP(GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K))
    fill(hf, seed=2)
    cfg = config(
        D,
        {"order": "topk_then_score", "logits_bias": True},
        num_experts=E,
        top_k=K,
        expert_dim=F,
        activation="gpt_oss",
        bias=True,
    )
    ours: Any = build_moe_layer(cfg, 0, {}, ExpertsConfig(backend="loop"))
    with torch.no_grad():
        ours.router.weight.copy_(hf.router.weight)
        ours.router.bias.copy_(hf.router.bias)
        # Stored as (E, D, 2F) with gate and up interleaved, and (E, F, D).
        ours.experts.w13.copy_(hf.experts.gate_up_proj.view(E, D, F, 2).permute(0, 3, 2, 1))
        ours.experts.b13.copy_(hf.experts.gate_up_proj_bias.view(E, F, 2).permute(0, 2, 1))
        ours.experts.w2.copy_(hf.experts.down_proj.mT)
        ours.experts.b2.copy_(hf.experts.down_proj_bias)
    return hf, ours


def layer_like(hf: Any, router: dict[str, Any], **moe: Any) -> Any:
    fill(hf, seed=2)
    ours: Any = build_moe_layer(
        config(D, router, num_experts=E, top_k=K, expert_dim=F, **moe), 0, {}, ExpertsConfig(backend="loop")
    )
    with torch.no_grad():
        ours.router.weight.copy_(hf.gate.weight)
        ours.experts.w13.copy_(hf.experts.gate_up_proj.view(E, 2, F, D))
        ours.experts.w2.copy_(hf.experts.down_proj)
    return ours


def copy_shared(ours: Any, theirs: Any) -> None:
    for name in ("gate", "up", "down"):
        getattr(ours.shared, f"w_{name}").weight.data.copy_(getattr(theirs, f"{name}_proj").weight)


@pytest.mark.parametrize("make", [mixtral, qwen2, deepseek_v3, gpt_oss])
def test_layer_equals_transformers_block(make: Any) -> None:
    hf, ours = make()
    probe = tokens(B * S, D, seed=4, dtype=torch.float32)
    results = []
    for module in (hf, ours):
        x = tokens(B * S, D, dtype=torch.float32).requires_grad_()
        if module is ours:
            out, router = ours(x, empty_carry(), TokenContext(seq_len=S))[0], ours.router
        else:
            out, router = hf(x.view(B, S, D)), hf.router if make is gpt_oss else hf.gate
            out = (out[0] if isinstance(out, tuple) else out).view(B * S, D)
        (out * probe).sum().backward()
        results.append((out, x.grad, router.weight.grad))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [0, 1, 9])
def test_layer_equals_a_sum_over_tokens_and_experts(n_tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(config(shared_dim=6), dtype=dtype)
    x = tokens(n_tokens, dtype=dtype).requires_grad_()
    out, _ = layer(x, empty_carry(), TokenContext(seq_len=max(n_tokens, 1)))
    assert out.shape == x.shape and out.dtype == dtype

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return down.double() @ (nn.functional.silu(gate.double() @ x) * (up.double() @ x))

    shared, experts = layer.shared, layer.experts
    expected = torch.zeros(n_tokens, D, dtype=torch.float64)
    for t in range(n_tokens):
        x_D = x[t].detach().double()
        best = (layer.router.weight.double() @ x_D).softmax(0).topk(2)
        for p, e in zip(best.values / best.values.sum(), best.indices, strict=True):
            expected[t] += p * mlp(x_D, experts.w13[e, 0], experts.w13[e, 1], experts.w2[e])
        expected[t] += mlp(x_D, shared.w_gate.weight, shared.w_up.weight, shared.w_down.weight)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters()), "also without tokens"


class Made(TorchDispatchMode):
    """How many tensors of a shape operators give, views aside."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.data_ptr() not in given]
        self.count += sum(t.shape == self.shape for t in new)
        return out


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_here_write_no_gathered_rows(recompute: bool) -> None:
    """Of R rows D wide there are the outputs, once more where they are recomputed, and the gradients of the inputs."""
    layer = make_layer(config(), dtype=torch.float32)
    layer.experts.backend, layer.experts.recompute = "cpu", recompute
    x = tokens(9, dtype=torch.float32).requires_grad_()
    with Made((9 * K, D)) as made:
        layer(x, empty_carry(), TokenContext(seq_len=9))[0].sum().backward()
    assert made.count == 2 + recompute
