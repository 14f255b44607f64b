"""BAM: attention and MLPs of several models as experts of one, against transformers' own layers of these models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config.errors import ConfigError
from moetrain.convert.source import Held
from moetrain.upcycle.measure import build
from moetrain.upcycle.method import Model, Upcycled
from tests.model.hf_models import float64_throughout, make, tokens
from tests.model.test_decoder import build as random_decoder
from tests.model.test_decoder import ids, tiny
from tests.upcycle.theirs import apply, assert_same, saved, tensors_of

N = 3
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own keys", "shared keys"])


class Mix(nn.Module):
    """Modules of which a softmax of a linear gate weighs all, or the top_k best."""

    def __init__(self, experts: Sequence[nn.Module], router_ND: Tensor, top_k: int = N) -> None:
        super().__init__()
        self.experts, self.router, self.top_k = nn.ModuleList(experts), nn.Parameter(router_ND.clone()), top_k

    def forward(self, x: Tensor | None = None, **given: Any) -> Any:
        x = given.pop("hidden_states") if x is None else x
        outs = [expert(x, **given) for expert in self.experts]
        scores = (x @ self.router.T).softmax(-1)
        scores = scores * (scores >= scores.topk(self.top_k, -1).values[..., -1:])
        scores = scores / scores.sum(-1, keepdim=True)
        is_attention = isinstance(outs[0], tuple)
        total = sum(scores[..., e : e + 1] * (out[0] if is_attention else out) for e, out in enumerate(outs))
        return (total, None) if is_attention else total


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Give all of ``tensors`` the value of their mean."""
    mean = torch.stack(list(tensors)).mean(0)
    for t in tensors:
        t.copy_(mean)


def reference(name: str, made: Upcycled, shared: bool) -> nn.Module:
    """transformers' model with the mean of the parents' tensors, but with the parents' own modules as experts."""
    parents: list[Any] = [make(name, torch.float64, seed) for seed in range(N)]
    model: Any = make(name, torch.float64)
    for key, t in model.state_dict().items():
        t.copy_(torch.stack([parent.state_dict()[key] for parent in parents]).mean(0))
    common = [".q_norm.", ".k_norm.", ".o_proj.bias", *([".k_proj.", ".v_proj."] if shared else [])]
    for tensors in zip(*(parent.named_parameters() for parent in parents), strict=True):
        if any(part in tensors[0][0] for part in common):
            average([t for _, t in tensors])
    for i, layer in enumerate(model.model.layers):
        attentions, mlps = ([getattr(p.model.layers[i], part) for p in parents] for part in ("self_attn", "mlp"))
        layer.self_attn = Mix(attentions, made.model.read(f"layers.{i}.attention.router.weight"))
        layer.mlp = Mix(mlps, made.model.read(f"layers.{i}.moe.router.weight"), top_k=2)
    return model


@SHARED
@pytest.mark.parametrize("name", ["llama-biases-llama3-geglu", "qwen2-some-windows", "qwen3-biases-windows", "granite"])
def test_heads_side_by_side_are_attentions_side_by_side(name: str, shared: bool, tmp_path: Path) -> None:
    """Biases, windows, norms of heads, other factors on scores: logits and gradients in float64."""
    folders = [saved(name, tmp_path / str(seed), seed) for seed in range(N)]
    made = apply("bam", folders, shared_kv=shared, router_std=0.5)
    ours = build(made.model, torch.float64)
    text = tokens()
    targets = text.roll(-1, 1)
    with float64_throughout():
        theirs: Any = reference(name, made, shared)
        want = theirs(text, use_cache=False).logits
        F.cross_entropy(want.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    for p in ours.parameters():
        p.requires_grad_(True)
    assert_same(ours(text)[0], want)
    ours(text, targets)[0].backward()
    grads = {key: p.grad for key, p in ours.named_parameters()}
    assert_same(grads["embed.weight"], theirs.model.embed_tokens.weight.grad)
    groups = 2 if shared else 1  # key/value heads, each with a query head of each expert for each of its own
    for i, layer in enumerate(theirs.model.layers):
        here = f"layers.{i}."
        assert_same(grads[here + "attention.router.weight"], layer.self_attn.router.grad)
        assert_same(grads[here + "moe.router.weight"], layer.mlp.router.grad)
        q_GNhD = grads[here + "attention.wq.weight"].unflatten(0, (groups, N, -1))
        o_GNhD = grads[here + "attention.wo.weight"].T.unflatten(0, (groups, N, -1))
        for e, attention in enumerate(layer.self_attn.experts):
            assert_same(q_GNhD[:, e].flatten(0, 1), attention.q_proj.weight.grad)
            assert_same(o_GNhD[:, e].flatten(0, 1).T, attention.o_proj.weight.grad)
        k_grads = [attention.k_proj.weight.grad for attention in layer.self_attn.experts]
        assert_same(grads[here + "attention.wk.weight"], sum(k_grads) if shared else torch.cat(k_grads))  # type: ignore[arg-type]


@SHARED
def test_of_one_model_thrice_it_is_that_model(shared: bool, tmp_path: Path) -> None:
    dense = saved("qwen3", tmp_path / "dense")
    made = apply("bam", [dense] * N, shared_kv=shared)
    with float64_throughout(), torch.no_grad():
        want = make("qwen3", torch.float64)(tokens()).logits
    assert_same(build(made.model, torch.float64)(tokens())[0], want)


def test_parallel_blocks_stay_parallel() -> None:
    """Of a parent as the paper has it, and read in pieces that end anywhere."""
    cfg = tiny("tiny")
    cfg.parallel_block, cfg.moe.num_experts = True, 0
    dense = random_decoder(cfg, {})
    parent = Model(cfg, Held(dense.state_dict()))
    for shared in (False, True):
        made = apply("bam", [parent, parent], shared_kv=shared)
        assert_same(build(made.model, torch.float64)(ids(cfg))[0], dense(ids(cfg))[0])
        for part, (rows, columns) in {"wq.weight": (31, 7), "wo.weight": (5, 31), "wk.weight": (9, 32)}.items():
            name = f"layers.1.attention.{part}"
            whole = made.model.read(name)
            for i in range(0, whole.shape[0], rows):
                for j in range(0, whole.shape[1], columns):
                    box = tuple(slice(at, min(at + n, most)) for at, n, most in
                                zip((i, j), (rows, columns), whole.shape, strict=True))  # fmt: skip
                    assert torch.equal(made.model.source.read(name, box), whole[box])


def test_parents_without_a_place_for_attention_experts_are_refused(tmp_path: Path) -> None:
    olmo = saved("olmo2", tmp_path / "olmo2")
    with pytest.raises(ConfigError, match=r"qk_norm=full, which .*olmo2 has; method=btx averages attention"):
        apply("bam", [olmo, olmo])
    llama = saved("llama", tmp_path / "llama")
    made = apply("bam", [llama, llama])
    assert made.model.cfg.attention.num_experts == 2 and len(tensors_of(made)["layers.0.attention.router.weight"]) == 2
    again = Model(made.model.cfg, made.model.source)
    again.cfg.moe.num_experts = 0
    with pytest.raises(ConfigError, match="num_experts=2"):
        apply("bam", [again, again])
