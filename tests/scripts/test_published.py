"""Published runs as the planner reads them: their models' FLOPs, and which of several mappings is predicted fastest."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import best_mappings
import fit_planner
import published
import published_models

HEAD = (
    "source,model,gpu,n_gpus,precision,seq_len,gbs,mbs,tp,cp,pp,vpp,ep,etp,tflops_per_gpu,mfu,"
    "tokens_per_s_per_gpu,notes"
)
# MoE Parallel Folding (arXiv 2504.14960), table 3: Qwen2-57B on 64 H100.
FOLDING = """
2504.14960 T3,Qwen2-57B-A14B,H100 SXM 80G,64,bf16,4096,256,,4,1,1,,4,,,,2699,MCore
2504.14960 T3,Qwen2-57B-A14B,H100 SXM 80G,64,bf16,4096,256,,2,1,4,,4,,,,4124,MCore
2504.14960 T3,Qwen2-57B-A14B,H100 SXM 80G,64,bf16,4096,256,,2,1,4,,4,1,,,4557,MCore+Folding"""


@pytest.mark.parametrize(
    ("name", "seq_len", "whole_square", "mtp_heads", "gflop"),
    [
        ("kimi k2", 4096, False, 0, 204.4),
        # Rounded: 89 TFLOP/s at 2.2 s a step.
        ("qwen3 next 80b a3b", 4096, True, 0, 23.9),
        # Megatron-Bridge counts the whole square of attention in hybrids, and logits but no layers of prediction.
        ("nemotron 3 nano", 8192, True, 0, 22.3),
        ("nemotron 3 super", 8192, True, 2, 84.7),
    ],
)
def test_model_flops_are_the_published_ones(
    name: str, seq_len: int, whole_square: bool, mtp_heads: int, gflop: float
) -> None:
    """Within 2% of published TFLOP/s over tokens/s, counted as the source counts."""
    shape = replace(published_models.model(name), mtp=0)
    flops = shape.flops_per_token(seq_len) + 3 * mtp_heads * 2.0 * shape.vocab * shape.dim
    if whole_square:
        kinds = [shape.kinds[k] for k in shape.layers]
        flops += 3 * sum(2.0 * kind.heads * (kind.qk + kind.v) * seq_len / 2 for kind in kinds)
    assert flops / 1e9 == pytest.approx(gflop, rel=0.02)


def test_v4_flash_has_the_parameters_of_transformers_and_the_published_flops() -> None:
    """Built on no device, to 0.01%; 90.8 GFLOP a token (Megatron-Bridge, at 4096 tokens), prediction layer and all."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    with torch.device("meta"):
        theirs = sum(p.numel() for p in DeepseekV4ForCausalLM(DeepseekV4Config()).parameters())
    shape = published_models.model("deepseek v4 flash")
    assert shape.count() == pytest.approx(theirs, rel=1e-4)
    assert shape.flops_per_token(4096) / 1e9 == pytest.approx(90.8, rel=0.02)


@pytest.fixture
def folding(tmp_path: Path) -> list[published.Row]:
    file = tmp_path / "rows.csv"
    file.write_text(HEAD + FOLDING + "\n")
    return list(published.rows_of(file))


def test_the_folded_mapping_is_predicted_fastest(folding: list[published.Row]) -> None:
    """As its authors found; and each speed within a fifth."""
    [(row, place, n)] = best_mappings.published_together(folding)
    assert (row.tokens, place, n) == (4557.0, 1, 3)
    assert np.all(np.abs(fit_planner.errors(folding, fit_planner.FITTED)) < 0.2)


def test_sets_of_constants_are_priced_as_one_by_one(folding: list[published.Row]) -> None:
    """The fit prices a step for all its derivatives at once."""
    runs, x = fit_planner.together(folding), fit_planner.logs(fit_planner.FITTED)
    base, slopes = runs.near(x)
    i = fit_planner.FREE.index("product_16")
    moved = x.copy()
    moved[i] -= fit_planner.STEP
    alone = np.log(published.predictions(folding, fit_planner.with_values(moved))[:, 0])
    assert (base - alone) / fit_planner.STEP == pytest.approx(slopes[:, i], abs=1e-9)
    assert (slopes[:, i] > 0).all()


def test_a_recipe_says_what_its_release_switched_on() -> None:
    """Facts of Megatron-Bridge's tags: no graphs and a plain all-to-all for Qwen3-235B on B200 in 26.04, graphs of the
    whole iteration on GB300 in 26.06."""
    early = published.recipe("qwen3 235b", "b200", "26.04.01", "fp8")
    late = published.recipe("qwen3 235b", "gb300", "26.06", "fp8")
    assert early and late
    assert (early[0].once, early[0].graphs, early[0].overlap) == (False, "", False)
    assert (late[0].graphs, late[0].overlap, late[0].attention_8) == ("all", True, True)
    assert published.recipe("mixtral 8x22b", "h100", "26.04", "bf16") is None
