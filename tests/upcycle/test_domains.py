"""Experts by domains: who keeps which dimension, by definition; a domain's expert and the shared one have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain import cli
from moetrain.config.errors import ConfigError
from moetrain.config.registry import UPCYCLERS
from moetrain.data.sources import resolve
from moetrain.moe.options import as_options
from moetrain.upcycle.measure import build
from moetrain.upcycle.method import Context, Upcycled
from tests.model.hf_models import make
from tests.upcycle.theirs import read_parent, saved, tensors_of

TEXTS = [torch.randint(low, low + 20, (4, 32), generator=torch.Generator().manual_seed(low)) for low in (0, 20, 41)]


def made_of(folder: Path, texts: list[Tensor], **options: object) -> Upcycled:
    entry = UPCYCLERS.get("domains")
    context = Context(0, lambda: texts)
    return entry.build(as_options(UPCYCLERS, options, "domains"), [read_parent(folder)], context)  # type: ignore[no-any-return]


def test_a_domain_keeps_what_it_uses_most(tmp_path: Path) -> None:
    """Reference: activations of transformers' own model; rows are told apart by their values."""
    dense = saved("llama", tmp_path / "dense")
    made = made_of(dense, TEXTS, keep=0.6)
    model = make("llama", torch.float64, 0)
    whole = tensors_of(made)
    for layer in range(3):
        mlp = model.model.layers[layer].mlp
        kept = [set(mean_activation(model, mlp, ids).topk(24).indices.tolist()) for ids in TEXTS]
        common = kept[0] & kept[1] & kept[2]
        n = made.model.cfg.layer_value("shared_dim", layer)
        shared = set(rows_in(whole[f"layers.{layer}.moe.shared.w_gate.weight"], mlp)) if n else set()
        assert shared <= common and len(shared) == n == min(len(common) // 8 * 8, 16)
        for e, mine in enumerate(whole[f"layers.{layer}.moe.experts.w13"][:, 0]):
            assert set(rows_in(mine, mlp)) == kept[e] - shared
            down = whole[f"layers.{layer}.moe.experts.w2"][e]
            assert torch.equal(down, mlp.down_proj.weight[:, rows_in(mine, mlp)])


def mean_activation(model: Any, mlp: Any, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().mean((0, 1))))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


def rows_in(rows: Tensor, mlp: Any) -> list[int]:
    """Which rows of the gate ``rows`` are."""
    return [int((mlp.gate_proj.weight == row).all(1).nonzero()) for row in rows]


def test_keeping_all_is_the_dense_function_whatever_the_router_says(tmp_path: Path) -> None:
    dense = saved("llama", tmp_path / "dense")
    made = made_of(dense, TEXTS, keep=1.0, layers=[0, 2])
    assert made.model.cfg.moe_layers() == [0, 2]
    assert (made.model.cfg.moe.shared_dim, made.model.cfg.moe.expert_dim) == ([32, 0, 32], [8, 0, 8])
    ids = torch.cat(TEXTS)
    with torch.no_grad():
        before, after = (build(model, torch.float64)(ids)[0] for model in (read_parent(dense), made.model))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [(TEXTS[:1], {}, "a file for each domain"), (TEXTS, {"top_k": 4}, "top_k=4 is more than num_experts=3")],
)
def test_refusals(texts: list[Tensor], options: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        made_of(saved("llama", tmp_path / "dense"), texts, **options)


def test_the_command_takes_a_file_for_each_domain(
    dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ",".join(resolve(f"moetrain:data/demo/{name}.txt") for name in ("docs", "plays"))
    words = ["upcycle", "method=domains", f"from={dense_folder}", f"out={tmp_path / 'moe'}", f"text={files}"]
    assert cli.main([*words, "tokens=1000"]) == 0
    said = capsys.readouterr().out
    assert "on text held out: wanted_by_fit " in said
    result = json.loads(said.strip().splitlines()[-1])
    assert 0.5 == result["wanted_by_chance"] < result["wanted_by_fit"] <= 1
