"""What stands for a document when documents are compared: one vector of length 1 each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moetrain.config.errors import ConfigError, DataError
from moetrain.mixture.extra import need

DIMENSIONS = 100
VOCABULARY = 50_000  # words
LONGEST = 512  # tokens of a document that a model reads
BATCH = 16


class Embedder(Protocol):
    """Learns from some documents, then embeds any."""

    def fit(self, texts: Sequence[str]) -> None:
        """Learn what is needed from a sample."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(N, dim) float32, each row of length 1 (or 0: nothing known is in the text)."""
        ...


class WordEmbedder:
    """Latent semantic analysis: TF-IDF of words and pairs of words, by a truncated SVD (Deerwester et al., 1990).

    Needs no download. Words are what lies between spaces and punctuation, so it is not for Chinese or Japanese.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, texts: Sequence[str]) -> None:
        self.words: Any = need("sklearn.feature_extraction.text").TfidfVectorizer(
            sublinear_tf=True, max_features=VOCABULARY, max_df=0.5, ngram_range=(1, 2), dtype=np.float32
        )
        try:
            found = self.words.fit_transform(texts)
        except ValueError:
            raise DataError("the documents share no words to compare them by; name a model with embed=DIR") from None
        dimensions = max(2, min(DIMENSIONS, found.shape[0] - 1, found.shape[1] - 1))
        self.svd: Any = need("sklearn.decomposition").TruncatedSVD(dimensions, random_state=self.seed)
        self.svd.fit(found)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return unit(self.svd.transform(self.words.transform(texts)))

    def typical(self, texts: Sequence[str], cluster_N: np.ndarray, clusters: int, count: int = 5) -> list[str]:
        """Of each cluster, the ``count`` words by which it differs most from all documents."""
        found = self.words.transform(texts)
        names, mean = self.words.get_feature_names_out(), np.asarray(found.mean(axis=0))[0]
        lines = []
        for cluster in range(clusters):
            mine = found[cluster_N == cluster]
            more = np.asarray(mine.mean(axis=0))[0] - mean if mine.shape[0] else mean * 0
            lines.append(", ".join(names[i] for i in np.argsort(-more)[:count]))
        return lines


class ModelEmbedder:
    """The mean of a Hugging Face model's last hidden states over the first ``LONGEST`` tokens of a document.

    folder: of the model and its tokenizer; nothing is downloaded. Raises ConfigError where it cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            why = str(error).strip().splitlines()[0]
            raise ConfigError(f"embed={folder}: not a Hugging Face model with its tokenizer: {why}") from None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing to learn."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        parts = []
        with torch.no_grad():
            for first in range(0, len(texts), BATCH):
                batch = self.tokenizer(
                    list(texts[first : first + BATCH]), padding=True, truncation=True, max_length=LONGEST,
                    return_tensors="pt", return_token_type_ids=False,
                ).to(self.device)  # fmt: skip
                states = self.model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"][..., None].float()
                parts.append(((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).cpu().numpy())
        return unit(np.concatenate(parts))


def unit(x_NF: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return (x_NF / np.maximum(np.linalg.norm(x_NF, axis=1, keepdims=True), 1e-12)).astype(np.float32)
