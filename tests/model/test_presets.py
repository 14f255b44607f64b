"""Presets have the published shapes: parameters as in papers, model cards and transformers, and training FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.config import load
from moetrain.config.schema import ModelConfig
from moetrain.convert.family import family_of
from moetrain.model.count import Counts, count_parameters, flops_per_token


def preset(name: str) -> ModelConfig:
    return load([f"model={name}"]).model


def everything(n: Counts) -> int:
    return 0


def no_embedding(n: Counts) -> int:
    return n.embedding


def no_embedding_or_head(n: Counts) -> int:
    return n.embedding + n.head


# preset, published total and active (in billions, as rounded there), and what each of the two leaves out
PUBLISHED = [
    # arXiv 2401.04088, section 2; all parameters
    ("mixtral-8x7b", 46.7, everything, 12.9, everything),
    # mistral.ai, "Cheaper, Better, Faster, Stronger" (2024-04-17); all parameters
    ("mixtral-8x22b", 141, everything, 39, everything),
    # arXiv 2409.02060, table 1 and section 2: 6.9B and 1.3B; the model card's 6.92B and 1.28B; all parameters
    ("olmoe-1b-7b", 6.92, everything, 1.28, everything),
    # model card: 30.5B, 29.9B without embeddings, 3.3B activated (3.35B, cut rather than rounded)
    ("qwen3-30b-a3b", 30.5, everything, 3.3, everything),
    ("qwen3-30b-a3b", 29.9, no_embedding_or_head, 3.3, everything),
    # model card: 235B, 234B without embeddings, 22B activated
    ("qwen3-235b-a22b", 235, everything, 22, everything),
    ("qwen3-235b-a22b", 234, no_embedding_or_head, 22, everything),
    # arXiv 2412.19437: 671B and 37B without the multi-token prediction layer; active is without the embedding (36.6B)
    ("deepseek-v3", 671, everything, 37, no_embedding),
    # arXiv 2407.10671, table 1: 57B and 14B; model card: 57B; all parameters
    ("qwen2-57b-a14b", 57, everything, 14, everything),
    # arXiv 2508.10925, table 1: 20.91B and 3.61B, 116.83B and 5.13B; "active" counts the unembedding, not the embedding
    ("gpt-oss-20b", 20.91, everything, 3.61, no_embedding),
    ("gpt-oss-120b", 116.83, everything, 5.13, no_embedding),
]


def agrees(count: int, published: float) -> bool:
    """Whether ``count`` is ``published`` billions, rounded or cut to as many decimals as were published."""
    decimals = len(str(published).partition(".")[2])
    cut = math.floor(count / 1e9 * 10**decimals) / 10**decimals
    return published in (cut, round(count / 1e9, decimals))


@pytest.mark.parametrize(("name", "total", "less_total", "active", "less_active"), PUBLISHED)
def test_published_parameter_counts(
    name: str, total: float, less_total: Callable[[Counts], int], active: float, less_active: Callable[[Counts], int]
) -> None:
    n = count_parameters(preset(name))
    assert agrees(n.total - less_total(n), total)
    assert agrees(n.active - less_active(n), active)


@pytest.mark.parametrize("name", sorted({row[0] for row in PUBLISHED}))
def test_every_parameter_of_transformers_own_class(name: str) -> None:
    cfg = preset(name)
    hf = family_of(cfg).to_hf_config(cfg)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf.pop("model_type"), **hf))
    assert count_parameters(cfg).total == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("name", "gflop"), [("deepseek-v3", 249.5), ("qwen3-235b-a22b", 148.0), ("qwen3-30b-a3b", 23.0)]
)
def test_training_flops_per_token_of_published_runs(name: str, gflop: float) -> None:
    """Model GFLOP per token at sequence 4096, as NVIDIA's published throughputs of these models imply."""
    assert flops_per_token(preset(name), 4096) / 1e9 == pytest.approx(gflop, rel=0.02)
