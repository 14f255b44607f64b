"""Clusters of documents: many small ones by k-means, then merged into few (CLIMB, arXiv 2504.13161, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrain.config.errors import DataError
from moetrain.mixture.embed import Embedder
from moetrain.mixture.extra import need

FINE = 10  # k-means makes this many times as many clusters as are wanted
LEAST_DOCUMENTS, LEAST_SHARE = 4, 0.1  # a cluster has so many documents, and this part of an even share of the tokens
SAMPLE = 20_000  # documents that vectors and centres are learnt from
BATCH = 1000


@dataclass(frozen=True)
class Clusters:
    """centres_CF: of the fine clusters; merged_C: the final cluster of each."""

    embedder: Embedder
    centres_CF: np.ndarray
    merged_C: np.ndarray

    @classmethod
    def learn(cls, texts: Sequence[str], sizes_N: np.ndarray, clusters: int, embedder: Embedder, seed: int) -> Clusters:
        """From a sample of documents and their tokens: ``clusters`` of them, or fewer where some would be tiny.

        CLIMB drops fine clusters of low quality first and merges those nearer than a threshold; here all text is kept
        and the wanted number is given. Raises DataError for fewer documents than clusters.
        """
        if len(texts) < LEAST_DOCUMENTS * clusters:
            raise DataError(
                f"{len(texts)} documents are too few for {clusters} clusters; give clusters="
                f"{max(2, len(texts) // LEAST_DOCUMENTS)} or less, or cut the text into documents by data.sources.NAME."
                f"delimiter"
            )
        embedder.fit(texts)
        x_NF = embedder.embed(texts)
        sklearn: Any = need("sklearn.cluster")
        fine = max(clusters, min(FINE * clusters, len(texts) // LEAST_DOCUMENTS))
        means = sklearn.KMeans(fine, n_init=3, random_state=seed).fit(x_NF)
        centres = means.cluster_centers_
        merged = np.arange(fine)
        if fine > clusters:
            merged = sklearn.AgglomerativeClustering(clusters, linkage="ward").fit_predict(centres)
        fine_N = nearest_centre(x_NF, centres)
        return cls(embedder, centres, merge_small(merged, centres, fine_N, sizes_N, clusters))

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.merged_C.max()) + 1

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) cluster of each document, int."""
        parts = [
            nearest_centre(self.embedder.embed(texts[first : first + BATCH]), self.centres_CF)
            for first in range(0, len(texts), BATCH)
        ]
        return self.merged_C[np.concatenate(parts)]


def nearest_centre(x_NF: np.ndarray, centres_CF: np.ndarray) -> np.ndarray:
    """(N,) the nearest centre of each row."""
    squares = (centres_CF**2).sum(axis=1) - 2 * x_NF @ centres_CF.T
    return squares.argmin(axis=1)


def merge_small(
    merged_C: np.ndarray, centres_CF: np.ndarray, fine_N: np.ndarray, sizes_N: np.ndarray, clusters: int
) -> np.ndarray:
    """``merged_C`` with each cluster that is too small joined to the nearest other one, the smallest first; numbered
    anew from 0 by falling size."""
    merged = merged_C.copy()
    tokens_C = np.bincount(fine_N, weights=sizes_N, minlength=len(merged))
    documents_C = np.bincount(fine_N, minlength=len(merged))
    least = LEAST_SHARE * sizes_N.sum() / clusters
    while True:
        names = np.unique(merged)
        tokens = np.array([tokens_C[merged == name].sum() for name in names])
        documents = np.array([documents_C[merged == name].sum() for name in names])
        small = (tokens < least) | (documents < LEAST_DOCUMENTS)
        if len(names) <= 2 or not small.any():
            number = {name: rank for rank, name in enumerate(names[np.argsort(-tokens, kind="stable")])}
            return np.array([number[name] for name in merged])
        middles = np.stack([centres_CF[merged == name].mean(axis=0) for name in names])
        at = np.where(small, tokens, np.inf).argmin()
        distance = np.linalg.norm(middles - middles[at], axis=1)
        distance[at] = np.inf
        merged[merged == names[at]] = names[distance.argmin()]
