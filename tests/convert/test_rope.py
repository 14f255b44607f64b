"""Rotary settings of config.json, against the frequencies of transformers' own models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.convert.family import family_named
from moetrain.model.rope import inverse_frequencies


def test_an_original_length_beside_the_rotary_settings_counts() -> None:
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, **lengths,
              "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}  # fmt: skip
    ours = family_named("llama").from_hf_config(config)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).model.rotary_emb
    angles, factor = inverse_frequencies(ours.rope, 8, torch.float32)
    torch.testing.assert_close(angles, theirs.inv_freq)
    assert factor == pytest.approx(theirs.attention_scaling)
