"""Routers choose the experts and weights that transformers' models choose, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moetrain.moe.routing import TokenContext
from tests.moe.toys import config, dense_weights, empty_carry, fill, make_router, tokens

D, E, K, T = 32, 16, 4, 64
COMMON: dict[str, Any] = {"hidden_size": D, "num_experts_per_tok": K}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}


def deepseek_v2() -> nn.Module:
    return DeepseekV2TopkRouter(
        DeepseekV2Config(
            **COMMON, **GROUPS, n_routed_experts=E, routed_scaling_factor=16.0, topk_method="group_limited_greedy"
        )
    )


def deepseek_v3(groups: dict[str, Any], norm_topk_prob: bool = True) -> nn.Module:
    return DeepseekV3TopkRouter(
        DeepseekV3Config(
            **COMMON, **groups, n_routed_experts=E, routed_scaling_factor=2.5, norm_topk_prob=norm_topk_prob
        )
    )


SIGMOID = {"score": "sigmoid", "scale": 2.5}
# name -> (transformers' router, our options, the name of its selection bias)
CASES: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "mixtral": (MixtralTopKRouter(MixtralConfig(**COMMON, num_local_experts=E)), {}, None),
    "qwen3": (Qwen3MoeTopKRouter(Qwen3MoeConfig(**COMMON, num_experts=E, norm_topk_prob=True)), {}, None),
    "olmoe": (
        OlmoeTopKRouter(OlmoeConfig(**COMMON, num_experts=E, norm_topk_prob=False)),
        {"renormalize": False},
        None,
    ),
    "gpt_oss": (
        GptOssTopKRouter(GptOssConfig(**COMMON, num_local_experts=E)),
        {"order": "topk_then_score", "logits_bias": True},
        None,
    ),
    "deepseek_v2": (
        deepseek_v2(),
        {"renormalize": False, "scale": 16.0, "n_groups": 4, "topk_groups": 2, "group_score": "max"},
        None,
    ),
    "deepseek_v3": (
        deepseek_v3(GROUPS),
        {**SIGMOID, "n_groups": 4, "topk_groups": 2},
        "e_score_correction_bias",
    ),
    "deepseek_v3_no_groups": (deepseek_v3({"n_group": 1, "topk_group": 1}), SIGMOID, "e_score_correction_bias"),
    "deepseek_v3_raw": (
        deepseek_v3(GROUPS, norm_topk_prob=False),
        {**SIGMOID, "n_groups": 4, "topk_groups": 2, "renormalize": False},
        "e_score_correction_bias",
    ),
    "ernie": (
        Ernie4_5_MoeTopKRouter(Ernie4_5_MoeConfig(hidden_size=D, moe_k=K, moe_num_experts=E)),
        {"min_sum": 1e-12},
        "moe_statics.e_score_correction_bias",
    ),
    "ernie_small_sums": (
        Ernie4_5_MoeTopKRouter(Ernie4_5_MoeConfig(hidden_size=D, moe_k=K, moe_num_experts=E, moe_norm_min=0.9)),
        {"min_sum": 0.9},
        "moe_statics.e_score_correction_bias",
    ),
}


def route(router: Any, x: torch.Tensor, training: bool = True) -> Any:
    return router(x, empty_carry(), TokenContext(seq_len=len(x), training=training))[0]


@pytest.mark.parametrize("name", CASES)
def test_choices_weights_and_gradients_equal_transformers(name: str) -> None:
    theirs, options, bias_name = CASES[name]
    fill(theirs, seed=3)
    balance: dict[str, Any] = {}
    if bias_name is not None:
        balance = {"bias": {}}
        bias = torch.linspace(-0.2, 0.2, E)[torch.randperm(E, generator=torch.Generator().manual_seed(5))]
        path, _, last = bias_name.rpartition(".")
        getattr(theirs.get_submodule(path), last).data.copy_(bias)
    cfg = config(D, options, num_experts=E, top_k=K)
    ours = make_router(cfg, balance, torch.float32)
    parameters = {n: p for n, p in theirs.named_parameters() if "bias" not in n or n == "bias"}
    ours.load_state_dict(parameters, strict=False)
    if bias_name is not None:
        ours.balance["bias"].bias_E.copy_(bias)

    x, probe = tokens(T, D, dtype=torch.float32), tokens(T, E, seed=9, dtype=torch.float32)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    routing = route(ours, x_ours)
    _, their_weights, their_ids = theirs(x_theirs)
    assert torch.equal(routing.ids_TK.sort().values, their_ids.sort().values)
    dense = dense_weights(routing.ids_TK, routing.weights_TK, E)
    their_dense = dense_weights(their_ids, their_weights, E)
    torch.testing.assert_close(dense, their_dense, rtol=1e-6, atol=1e-7)

    (dense * probe).sum().backward()
    (their_dense * probe).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-5, atol=1e-6)
    for key, p in parameters.items():
        if p.requires_grad:
            torch.testing.assert_close(ours.get_parameter(key).grad, p.grad, rtol=1e-5, atol=1e-5)
            p.grad = None


def test_sigmoid_after_top_k_scores_the_chosen_logits() -> None:
    """Llama 4: the sigmoid of the best logits, as they are."""
    router = make_router(config(router={"score": "sigmoid", "order": "topk_then_score", "renormalize": False}))
    x = tokens(10)
    routing = route(router, x)
    best = (x @ router.weight.T).topk(2)
    assert torch.equal(routing.ids_TK, best.indices)
    torch.testing.assert_close(routing.weights_TK, best.values.sigmoid(), rtol=1e-14, atol=0)


def test_forced_balance_gives_every_expert_the_same_rows_whatever_the_scores() -> None:
    router = make_router(config(router={"force_balance": True}))
    with torch.no_grad():
        router.weight[3] += 100 * router.weight[3].sign()
    x = tokens(20).requires_grad_()
    routing = route(router, x)
    assert router.counts_E.tolist() == [5] * 8
    assert all(len(set(ids)) == 2 for ids in routing.ids_TK.tolist())
    routing.weights_TK[:, 0].sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0


def test_bf16_input_is_routed_in_float32() -> None:
    """Rounding logits to bfloat16 would change choices; only the input is rounded."""
    router = make_router(config(), dtype=torch.bfloat16)
    x = tokens(50).to(torch.bfloat16)
    routing = route(router, x)
    probs = (x.double() @ router.weight.double().T).softmax(-1)
    best = probs.topk(2)
    assert routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.ids_TK, best.indices)
    expected = best.values / best.values.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK.double(), expected, rtol=1e-5, atol=1e-6)


def test_loads_are_counted_in_training_only() -> None:
    router = make_router(config())
    for training, expected in ((True, 2 * 30), (False, 2 * 30), (True, 2 * 60)):
        routing = route(router, tokens(30), training)
        assert int(router.counts_E.sum()) == expected
    once = torch.bincount(routing.ids_TK.flatten(), minlength=8)
    assert torch.equal(router.counts_E, 2 * once)
