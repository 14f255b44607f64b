"""Models with experts get more or fewer: what theory says is unchanged is unchanged in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moetrain.config.errors import ConfigError
from moetrain.convert.source import Held
from moetrain.upcycle.method import Context, Model, Upcycled
from moetrain.upcycle.resize import experts_of
from moetrain.upcycle.watch import usage
from tests.model.hf_models import DEEPSEEK, MODELS, tokens
from tests.upcycle.theirs import apply, assert_same, exported, logits, read_parent, saved, tensors_of

# The dimension of a layer's tensors that counts an expert's neurons
NEURONS = {"w13": 2, "w2": 2, "b13": 2}


def moe_folder(name: str, folder: Path) -> Path:
    """A saved model with experts: ``name``, or of dense ``name`` by sparse upcycling with noise."""
    if "moe" in name or name in ("mixtral", "gpt_oss"):
        return saved(name, folder)
    dense = saved(name, folder / "dense")
    return exported(apply("sparse", [dense], num_experts=6, noise=0.1, router_std=0.5), folder / "moe")


def one_expert_in_many_orders(folder: Path) -> Model:
    """The model in ``folder``, all experts the first of their layer, each with its neurons in another order."""
    parent = read_parent(folder)
    mixed = tensors_of(parent)
    for name, t in mixed.items():
        part = name.rpartition(".")[2]
        if ".experts." not in name:
            continue
        same = t[:1].expand_as(t).clone()
        if part in NEURONS:
            for e in range(len(t)):
                order = torch.randperm(t.shape[NEURONS[part]], generator=torch.Generator().manual_seed(e))
                same[e] = same[e].index_select(NEURONS[part] - 1, order)
        mixed[name] = same
    return replace(parent, source=Held(mixed))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe-dense-layer-reglu", "olmoe", "gpt_oss"])
def test_usage_is_what_transformers_counts(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "moe")

    found = usage(read_parent(folder), Context(0, lambda: [tokens()]), "logits")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        router_logits = [r for r in theirs(tokens(), output_router_logits=True).router_logits if r is not None]
    assert len(found) == len(router_logits)
    for mine, logits_TE in zip(found.values(), router_logits, strict=True):
        chosen = logits_TE.topk(2).indices.flatten()
        assert mine.counts_E.tolist() == torch.bincount(chosen, minlength=6).tolist()
        if name == "mixtral":  # whose router_logits are logits; others give scores
            expected = torch.nn.functional.cosine_similarity(logits_TE.T[:, None], logits_TE.T[None], dim=-1)
            torch.testing.assert_close(mine.alike_EE, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "arcee"])
def test_pruning_what_a_text_does_not_use_changes_nothing_there(name: str, tmp_path: Path) -> None:
    """Two tokens choose four experts of a layer at most; the weights of those chosen are divided by their sum."""
    folder, ids = moe_folder(name, tmp_path / "moe"), tokens(1, 2)
    made = apply("prune", [folder], ids=ids, num_experts=4)
    assert not made.exact
    assert_same(logits(exported(made, tmp_path / "out"), ids), logits(folder, ids))
    counts = usage(read_parent(folder), Context(0, lambda: [ids]), "nothing")[1].counts_E
    kept = counts.argsort(descending=True, stable=True)[:4].sort().values
    w2 = read_parent(folder).read("layers.1.moe.experts.w2")
    assert torch.equal(tensors_of(made)["layers.1.moe.experts.w2"], w2[kept])


@pytest.mark.parametrize("name", ["deepseek_v3-one-group", "glm4_moe"])
def test_growing_under_a_selection_bias_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_group = DEEPSEEK | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    monkeypatch.setitem(MODELS, "deepseek_v3-one-group", ("deepseek_v3", one_group))
    folder = saved(name, tmp_path / "moe")
    before = experts_of(read_parent(folder).cfg)
    made = apply("grow", [folder], ids=tokens(), add=3)
    assert made.exact and experts_of(made.model.cfg) == before + 3
    assert_same(logits(exported(made, tmp_path / "out")), logits(folder))
    most = usage(read_parent(folder), Context(0, lambda: [tokens()]), "nothing")[1].counts_E.argmax()
    w2 = tensors_of(made)["layers.1.moe.experts.w2"]
    assert torch.equal(w2[before], w2[most])


def test_growing_a_top_1_softmax_router_changes_nothing(tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    parent = apply("sparse", [dense], num_experts=4, top_k=1, router_std=0.5, noise=0.1).model
    whole = exported(Upcycled(parent, True, ""), tmp_path / "whole")
    made = apply("grow", [parent], add=2, copy_of=[3, 0])
    assert made.exact
    assert_same(logits(exported(made, tmp_path / "out")), logits(whole))
    w2 = tensors_of(made)["layers.2.moe.experts.w2"]
    assert torch.equal(w2[4], w2[3]) and torch.equal(w2[5], w2[0])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "ernie4_5_moe", "arcee"])
def test_growing_for_more_experts_per_token_changes_few_tokens(name: str, tmp_path: Path) -> None:
    folder = moe_folder(name, tmp_path / "moe")
    made = apply("grow", [folder], add=1, copy_of=[2])
    assert not made.exact
    change = (logits(exported(made, tmp_path / "out")) - logits(folder)).abs()
    assert torch.isfinite(change).all()
    if name == "mixtral":
        # a first token sees no other, so its change is that of its own choices; most have none
        assert (change[:, 0].amax(-1) < 1e-9).any()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "ernie4_5_moe", "arcee"])
def test_one_function_in_many_orders_of_neurons_merges_to_itself(name: str, tmp_path: Path) -> None:
    parent = one_expert_in_many_orders(moe_folder(name, tmp_path / "moe"))
    before = logits(exported(Upcycled(parent, True, ""), tmp_path / "before"))
    made = apply("merge", [parent], ids=tokens(), num_experts=2)
    assert_same(logits(exported(made, tmp_path / "out")), before)
    blind = apply("merge", [parent], ids=tokens(), num_experts=2, align=False)
    assert (logits(exported(blind, tmp_path / "blind")) - before).abs().max() > 0.01


@pytest.mark.parametrize("alike", ["logits", "outputs"])
def test_groups_of_like_experts_are_found_and_weighed_by_usage(alike: str, tmp_path: Path) -> None:
    """Experts e and e + 3 nearly are one: the same row and weights but for a little noise."""
    parent = read_parent(saved("mixtral", tmp_path / "moe"))
    twins = tensors_of(parent)
    for layer in range(3):
        for part in ("router.weight", "experts.w13", "experts.w2"):
            t = twins[f"layers.{layer}.moe.{part}"].clone()
            t[3:] = t[:3] + 1e-3 * torch.randn(t[:3].shape, generator=torch.Generator().manual_seed(layer))
            twins[f"layers.{layer}.moe.{part}"] = t
    parent = replace(parent, source=Held(twins))
    counts = usage(parent, Context(0, lambda: [tokens()]), "nothing")
    made = apply("merge", [parent], ids=tokens(), num_experts=3, alike=alike, top_k=1)
    for layer in range(3):
        # cores are the three most used; they can be twins, so only layers whose cores are not are looked at
        cores = counts[layer].counts_E.argsort(descending=True, stable=True)[:3].sort().values.tolist()
        if len({core % 3 for core in cores}) < 3:
            continue
        share, w2 = counts[layer].counts_E + 1, twins[f"layers.{layer}.moe.experts.w2"]
        for group, core in enumerate(cores):
            pair = [core % 3, core % 3 + 3]
            expected = (share[pair][:, None, None] * w2[pair]).sum(0) / share[pair].sum()
            assert_same(tensors_of(made)[f"layers.{layer}.moe.experts.w2"][group], expected)


def test_the_rank_of_merged_experts(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "moe")
    made = apply("merge", [folder], ids=tokens(), num_experts=3, rank=5, alike="outputs", align=False)
    w13, w2 = (tensors_of(made)[f"layers.0.moe.experts.{name}"] for name in ("w13", "w2"))
    assert torch.linalg.matrix_rank(w13).tolist() == [[5, 5]] * 3 and torch.linalg.matrix_rank(w2).tolist() == [5] * 3
    whole = apply("merge", [folder], ids=tokens(), num_experts=3, rank=40, alike="outputs", align=False).model
    plain = apply("merge", [folder], ids=tokens(), num_experts=3, alike="outputs", align=False).model
    assert_same(whole.read("layers.0.moe.experts.w2"), plain.read("layers.0.moe.experts.w2"))


@pytest.mark.parametrize(
    ("method", "name", "options", "says"),
    [
        ("prune", "llama", {}, "needs a model with experts; .* is dense"),
        ("prune", "mixtral", {"num_experts": 7}, "has only 6; grow it"),
        ("prune", "mixtral", {"num_experts": 1}, "top_k=2 is more than num_experts=1"),
        ("merge", "deepseek_v3", {}, "chooses by n_groups=4 groups"),
        ("grow", "mixtral", {"copy_of": [6]}, r"copy_of=\[6\] must name add=1 of the experts 0 to 5"),
    ],
)
def test_what_cannot_be_is_refused(method: str, name: str, options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        apply(method, [saved(name, tmp_path / "parent")], **options)
