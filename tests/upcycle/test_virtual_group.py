"""Fine-grained experts: whole groups are the dense layer again; factors make up for small routing weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moetrain.config.errors import ConfigError
from tests.upcycle.theirs import DENSE, apply, assert_same, exported, logits, saved, tensors_of


@pytest.mark.parametrize(("granularity", "top_k"), [(1, 2), (2, 2), (2, 4), (4, 4), (4, 8)])
def test_whole_groups_under_a_softmax_over_the_chosen_are_the_dense_function(
    granularity: int, top_k: int, tmp_path: Path
) -> None:
    dense = saved("llama", tmp_path / "dense")
    made = apply("virtual_group", [dense], num_experts=8, granularity=granularity, top_k=top_k)
    assert made.exact
    assert_same(logits(exported(made, tmp_path / "out")), logits(dense))


@pytest.mark.parametrize("activation", DENSE)
@pytest.mark.parametrize("scale_in", ["down", "all"])
def test_factors_inside_the_activation_are_exact_where_it_is_homogeneous(
    activation: str, scale_in: str, tmp_path: Path
) -> None:
    """ReGLU and squared ReLU of c x are c^2 times those of x; SwiGLU's and GELU's are not that, nor c times."""
    dense = saved(DENSE[activation], tmp_path / "dense")
    made = apply("virtual_group", [dense], num_experts=8, granularity=4, top_k=4, scale_in=scale_in)
    assert made.model.cfg.moe.activation == activation
    assert made.exact == (scale_in == "down" or activation in ("reglu", "relu2"))
    out, reference = logits(exported(made, tmp_path / "out")), logits(dense)
    if made.exact:
        assert_same(out, reference)
    else:
        assert (out - reference).abs().max() > 1e-3


def test_a_softmax_over_all_is_exact_where_all_experts_are_chosen(tmp_path: Path) -> None:
    dense = saved("qwen3", tmp_path / "dense")
    options = {"num_experts": 8, "granularity": 4, "top_k": 8, "order": "softmax_then_topk"}
    made = apply("virtual_group", [dense], **options)
    assert made.exact
    assert_same(logits(exported(made, tmp_path / "out")), logits(dense))


def test_a_softmax_over_all_is_right_in_the_limit_of_a_small_router(tmp_path: Path) -> None:
    """E copies, G slices, T chosen: weights of 1/(E G) times s = E G^2 / T give each whole group its share."""
    dense = saved("qwen3", tmp_path / "dense")
    reference = logits(dense)
    errors = []
    for std in (1e-2, 1e-4):
        options = {"num_experts": 8, "granularity": 2, "top_k": 4, "order": "softmax_then_topk", "router_std": std}
        made = apply("virtual_group", [dense], **options)
        assert not made.exact
        errors.append((logits(exported(made, tmp_path / f"{std}")) - reference).abs().max().item())
    assert errors[1] < errors[0] / 30 and errors[1] < 1e-2


@pytest.mark.parametrize(("name", "factor"), [("qwen3", 4), ("arcee", 4), ("arcee-gelu-yarn", 8)])
def test_the_papers_factors(name: str, factor: int, tmp_path: Path) -> None:
    """E8G8T8: 64 experts, s = 8 * 64 / 8 = 64, of which each matrix gets the cube root, where the activation is gated
    or squared ReLU, and with GELU the square root."""
    dense = saved(name, tmp_path / "dense")
    options = {"num_experts": 64, "granularity": 8, "top_k": 8, "order": "softmax_then_topk", "scale_in": "all"}
    made = apply("virtual_group", [dense], **options)
    before = dict(tensors_of(apply("sparse", [dense], num_experts=1, top_k=1)).items())
    w13, w2 = (tensors_of(made)[f"layers.1.moe.experts.{name}"] for name in ("w13", "w2"))
    whole13, whole2 = (before[f"layers.1.moe.experts.{name}"][0] for name in ("w13", "w2"))
    assert w13.shape == (64, len(whole13), 5, 32) and w2.shape == (64, 32, 5)
    for e in (0, 7, 8, 63):
        rows = slice(5 * (e % 8), 5 * (e % 8) + 5)
        assert_same(w13[e], factor * whole13[:, rows])
        assert_same(w2[e], factor * whole2[:, rows])
    router = tensors_of(made)["layers.1.moe.router.weight"]
    assert torch.equal(router[::8].repeat_interleave(8, 0), router) and not torch.equal(router[0], router[8])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"granularity": 3, "num_experts": 6, "top_k": 3},
            "granularity=3 does not divide the dense width 40 .*; set granularity=2 or granularity=4",
        ),
        ({"granularity": 4, "num_experts": 6, "top_k": 4}, "granularity=4 does not divide num_experts=6"),
        ({"router": "zero"}, "needs router=random"),
        ({"num_experts": 4, "granularity": 4, "top_k": 8}, "top_k=8 is more than num_experts=4"),
    ],
)
def test_what_does_not_divide_is_refused(options: dict, says: str, tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    with pytest.raises(ConfigError, match=says):
        apply("virtual_group", [dense], **options)
