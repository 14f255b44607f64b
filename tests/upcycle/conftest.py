"""A small dense model folder with a tokenizer, as a user has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moetrain.data.sources import resolve

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


@pytest.fixture
def dense_folder(tmp_path: Path) -> Path:
    """A random Llama in bfloat16 with the tokenizer of the demo."""
    return save_dense(tmp_path / "dense")


def save_dense(folder: Path) -> Path:
    """Write that model to ``folder``."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, max_position_embeddings=512, eos_token_id=0, **SIZES)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=resolve("moetrain:data/demo/tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return folder
