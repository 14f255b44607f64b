"""Config of a model that was trained with moetrain and that no class of transformers has."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MoetrainConfig(PretrainedConfig):  # type: ignore[misc]
    """``moetrain``: the model as moetrain's own config describes it. The other keys repeat parts of it."""

    model_type = "moetrain"

    def __init__(self, moetrain: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.moetrain = moetrain or {}
        if moetrain:
            self.vocab_size = moetrain["vocab_size"]
            self.hidden_size = moetrain["dim"]
            self.num_hidden_layers = moetrain["n_layers"]
            self.num_attention_heads = moetrain["attention"]["n_heads"]
            self.max_position_embeddings = moetrain["max_seq_len"]
