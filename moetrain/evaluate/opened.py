"""A model in memory with its tokenizer, of a run or of anything else that holds weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.checkpoint.weights import SavedWeights
from moetrain.config import read
from moetrain.config.errors import ConfigError, ConvertError
from moetrain.config.schema import Config, ExpertsConfig, ModelConfig
from moetrain.convert.open import open_weights
from moetrain.convert.source import Source, fill
from moetrain.convert.tensors import SELECTION_BIAS
from moetrain.data.tokenizer import LoadedTokenizer, load_tokenizer
from moetrain.model.decoder import Decoder


@dataclass(frozen=True)
class InMemory:
    """path: of the weights' files. run: the config of the run that they are of, if they are of one."""

    path: Path
    decoder: Decoder
    tokenizer: LoadedTokenizer
    run: Config | None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.decoder.parameters()).device


@torch.no_grad()
def build(cfg: ModelConfig, source: Source, dtype: torch.dtype, device: str = "cpu") -> Decoder:
    """The model of ``cfg`` with the weights of ``source``, in evaluation mode."""
    has_bias = any(name.endswith(SELECTION_BIAS) for name in source.specs)
    balance: dict[str, Any] = {"bias": {}} if has_bias else {}
    with torch.device("meta"):
        decoder = Decoder(cfg, balance, ExpertsConfig()).to(dtype)
    decoder = decoder.to_empty(device=device).eval()
    fill(decoder.state_dict(), source)
    return decoder


def open_model(path: str, dtype: torch.dtype) -> InMemory:
    """The model at ``path`` (all that ``open_weights`` takes) on the GPU if there is one. Dropless, as its export is.
    Raises a UserError for a path without weights or a tokenizer."""
    opened = open_weights(path)
    if opened.tokenizer is None:
        raise ConvertError(f"'{path}' has no tokenizer.json; put its tokenizer beside the weights")
    opened.model.moe.capacity_factor = None
    decoder = build(opened.model, opened.source, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    trained = isinstance(opened.source, SavedWeights) and opened.source.trained
    run = read(opened.path.absolute().parent.parent / "config.yaml") if trained else None
    tokenizer = load_tokenizer(str(opened.tokenizer))
    if tokenizer.vocab_size > opened.model.vocab_size:
        raise ConfigError(
            f"'{path}': its tokenizer has {tokenizer.vocab_size} tokens, its model {opened.model.vocab_size}; put the "
            "tokenizer that it was trained with beside it"
        )
    return InMemory(opened.path, decoder, tokenizer, run)
