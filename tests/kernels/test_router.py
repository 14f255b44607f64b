"""The choice of experts: as transformers' routers choose, as its definition says, and the same on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_kernels import router_topk
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tests.kernels.ops import BACKENDS, compare, normal, run

E, K, T = 24, 4, 37
V3: dict[str, Any] = {"score": "sigmoid", "scale": 2.5, "groups": 4, "top_groups": 2}
V2: dict[str, Any] = {"renormalize": False, "scale": 16.0, "groups": 4, "top_groups": 2, "group_score": "max"}
COMMON: dict[str, Any] = {"hidden_size": E, "num_experts_per_tok": K, "num_attention_heads": 4}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "n_routed_experts": E}


def theirs(name: str) -> nn.Module:
    """A router of transformers whose logits are its input."""
    router: nn.Module
    if name == "mixtral":
        router = MixtralTopKRouter(MixtralConfig(**COMMON, num_local_experts=E))
    elif name == "qwen3":
        router = Qwen3MoeTopKRouter(Qwen3MoeConfig(**COMMON, num_experts=E, norm_topk_prob=False))
    elif name == "deepseek_v2":
        method: dict[str, Any] = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
        router = DeepseekV2TopkRouter(DeepseekV2Config(**COMMON, **GROUPS, **method))
    else:
        router = DeepseekV3TopkRouter(
            DeepseekV3Config(**COMMON, **GROUPS, routed_scaling_factor=2.5, norm_topk_prob=True)
        )
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(E))
    return router


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("mixtral", {}), ("qwen3", {"renormalize": False}), ("deepseek_v2", V2), ("deepseek_v3", V3)],
)
def test_as_transformers(name: str, options: dict[str, Any], backend: str) -> None:
    """Experts, weights and gradients; DeepSeek-V3 with a bias that only the choice sees."""
    router, bias_E = theirs(name), None
    if name == "deepseek_v3":
        bias_E = normal(E).float() / 5
        router.get_buffer("e_score_correction_bias").copy_(bias_E)
    logits, probe_TE = normal(T, E).float(), normal(T, E, seed=1).float()
    mine, others = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    choice = router_topk(mine, K, bias_E=bias_E, backend=backend, **options)
    _, their_weights, their_ids = router(others)
    assert torch.equal(choice.ids_TK.sort().values, their_ids.sort().values)
    assert torch.equal(choice.counts_E, torch.bincount(their_ids.flatten(), minlength=E))
    want = torch.zeros(T, E).scatter(1, their_ids, their_weights.float())
    got = torch.zeros(T, E).scatter(1, choice.ids_TK, choice.weights_TK)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    (got * probe_TE).sum().backward()
    (want * probe_TE).sum().backward()
    torch.testing.assert_close(mine.grad, others.grad, rtol=1e-5, atol=2e-6)


def definition(
    logits_TE: Tensor, k: int, score: str, bias_E: Tensor | None, groups: int, top_groups: int, top2: bool
) -> list[list[int]]:
    """The chosen of each row, by sorting lists of Python numbers."""
    all_s = (logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()) + (0 if bias_E is None else bias_E)
    size, chosen = logits_TE.shape[1] // groups, []
    for s in all_s.tolist():
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        value = [sum(sorted((s[e] for e in m), reverse=True)[: 2 if top2 else 1]) for m in members]
        best = [g for _, g in sorted((-value[g], g) for g in range(groups))][:top_groups]
        candidates = sorted((-s[e], e) for g in best for e in members[g])
        chosen.append([e for _, e in candidates][:k])
    return chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("experts", "k", "groups", "top_groups", "top2"),
    [(24, 4, 1, 1, True), (24, 5, 4, 2, True), (21, 6, 3, 2, False), (20, 1, 5, 1, True), (6, 6, 1, 1, True)],
)
def test_of_equals_the_lower_id(
    experts: int, k: int, groups: int, top_groups: int, top2: bool, score: str, backend: str
) -> None:
    """Logits are whole numbers from -1 to 1, so most scores have equals, and many groups too."""
    logits_TE = normal(T, experts).round().clamp(-1, 1).float()
    bias_E = normal(experts).round().clamp(0, 1).float() if score == "sigmoid" else None
    group_score = "top2_sum" if top2 else "max"
    choice = router_topk(
        logits_TE, k, score=score, bias_E=bias_E, groups=groups, top_groups=top_groups, group_score=group_score,
        backend=backend,
    )  # fmt: skip
    assert choice.ids_TK.tolist() == definition(logits_TE, k, score, bias_E, groups, top_groups, top2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"renormalize": False, "scale": 3.0}, {"score": "sigmoid"}, {**V3, "renormalize": False}, V3],
    ids=str,
)
def test_gradients_are_those_of_the_formula(options: dict[str, Any], with_scores: bool, backend: str) -> None:
    """In float64, by autograd through the formula on the experts that were chosen."""
    logits_TE = normal(T, E)
    ids_TK = router_topk(logits_TE, K, **options).ids_TK

    def formula(logits_TE: Tensor) -> tuple[Any, ...]:
        s_TE = logits_TE.softmax(-1) if options.get("score", "softmax") == "softmax" else logits_TE.sigmoid()
        w_TK = s_TE.gather(1, ids_TK)
        if options.get("renormalize", True):
            w_TK = w_TK / w_TK.sum(-1, keepdim=True)
        return w_TK * options.get("scale", 1.0), s_TE if with_scores else None

    def op(logits_TE: Tensor) -> tuple[Any, ...]:
        choice = router_topk(logits_TE, K, with_scores=with_scores, backend=backend, **options)
        assert torch.equal(choice.ids_TK, ids_TK)
        return choice.weights_TK, choice.scores_TE

    exact = backend == "torch"
    got = run(op, {"logits_TE": logits_TE}, torch.float64 if exact else torch.float32)
    compare(got, run(formula, {"logits_TE": logits_TE}), 1e-12 if exact else 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_and_edges(backend: str) -> None:
    """More rows than a program's, no rows, and half-precision logits, which are scored in float32."""
    for rows in (300, 0):
        logits_TE = normal(rows, 5).bfloat16()
        choice = router_topk(logits_TE, 2, backend=backend)
        assert torch.equal(choice.counts_E, torch.bincount(choice.ids_TK.flatten(), minlength=5))
        assert choice.weights_TK.dtype == torch.float32 and choice.scores_TE is None
        assert torch.allclose(choice.weights_TK.sum(1), torch.ones(rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_logit_spoils_its_row_alone(backend: str) -> None:
    """By softmax all scores of the row are NaN, so equal; by sigmoid one is, and comes first."""
    logits_TE = normal(6, 8).float()
    logits_TE[2, 5] = float("nan")
    for score, first in (("softmax", [0, 1, 2]), ("sigmoid", [5])):
        choice = router_topk(logits_TE, 3, score=score, backend=backend)
        assert choice.ids_TK[2].tolist()[: len(first)] == first
        assert choice.weights_TK[2].isnan().all() and choice.weights_TK[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_underflowing_and_closed_experts(backend: str) -> None:
    """Sigmoids of 0 give weights of 0, no NaN; a bias of -inf closes an expert where others are left."""
    choice = router_topk(torch.full((3, 4), -200.0), 2, score="sigmoid", backend=backend)
    assert choice.ids_TK.tolist() == [[0, 1]] * 3 and not choice.weights_TK.any()
    bias_E = torch.tensor([float("-inf"), 0.0, 0.0, 0.0])
    choice = router_topk(torch.zeros(1, 4), 3, bias_E=bias_E, backend=backend)
    assert choice.ids_TK.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again_and_one_graph_under_compile(backend: str) -> None:
    def op(logits_TE: Tensor) -> tuple[Tensor, ...]:
        return tuple(router_topk(logits_TE, K, with_scores=True, backend=backend, **V3))  # type: ignore[arg-type]

    inputs = {"logits_TE": normal(T, E)}
    first, again = (run(op, inputs, torch.float32) for _ in range(2))
    whole = run(torch.compile(op, backend="aot_eager", fullgraph=True), inputs, torch.float32)
    assert all(torch.equal(first[name], again[name]) for name in first)
    compare(whole, first, 1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"k": 9}, r"k from 1 to E, not \(6, 8\) and 9"),
        ({"score": "tanh"}, "score is softmax or sigmoid, not 'tanh'"),
        ({"groups": 3}, "groups=3 must divide 8 experts"),
        ({"groups": 4, "top_groups": 1, "k": 3}, "1 groups of 2 experts cannot give k=3; raise top_groups"),
        ({"groups": 8, "top_groups": 3}, "top2_sum needs 2 experts or more in a group, not 1"),
        ({"group_score": "sum"}, "group_score is top2_sum or max, not 'sum'"),
        ({"bias_E": torch.zeros(7)}, r"bias_E has shape \(7,\) where logits \(6, 8\) need \(8,\)"),
        ({"backend": "loop"}, "router_topk has no backend 'loop'"),
    ],
)
def test_inputs_that_do_not_fit(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        router_topk(torch.zeros(6, 8), **{"k": 2} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, V3], ids=["softmax", "sigmoid"])
def test_what_was_chosen_before_stays(options: dict[str, Any], backend: str) -> None:
    """Also where the logits have moved since, as for a layer that is computed again: the weights are those of the given
    experts under the new logits, the loads those of the given ids."""
    ids_TK = router_topk(normal(T, E, seed=7).float(), K).ids_TK
    again = run(
        lambda logits: router_topk(logits, K, ids_TK=ids_TK, backend=backend, with_scores=True, **options),
        {"logits": normal(T, E)},
        torch.float32,
    )

    def exact(logits: Tensor) -> tuple[Tensor, ...]:
        scores = logits.sigmoid() if options else logits.softmax(-1)
        weights = scores.gather(1, ids_TK)
        weights = weights / weights.sum(1, keepdim=True) * options.get("scale", 1.0)
        return weights, ids_TK, torch.bincount(ids_TK.flatten(), minlength=E), scores

    compare(again, run(exact, {"logits": normal(T, E)}), 2e-6)
    with pytest.raises(ValueError, match=rf"ids_TK has shape \({T}, {K}\); it is \(T, k\), \({T}, {K - 1}\)"):
        router_topk(normal(T, E), K - 1, ids_TK=ids_TK)
