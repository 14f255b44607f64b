"""``moetrain mixture cluster=DIR``: a data set sorted anew, with clusters of documents as its domains."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import yaml
from tokenizers import Tokenizer
from tqdm import tqdm

from moetrain.config import Config, load
from moetrain.config.errors import ConfigError
from moetrain.data.dataset import TokenData
from moetrain.data.manifest import SPLITS
from moetrain.data.prepare import prepare
from moetrain.mixture.cluster import BATCH, SAMPLE, Clusters
from moetrain.mixture.embed import Embedder, ModelEmbedder, WordEmbedder
from moetrain.mixture.extra import need
from moetrain.mixture.words import Asked

logger = logging.getLogger("moetrain")

LONGEST = 2048  # tokens of a document, from its start, that decide on its cluster


@dataclass(frozen=True)
class Place:
    """Where a document lies in a prepared data set."""

    domain: str
    split: str
    start: int
    tokens: int


def cluster(asked: Asked, config_dirs: Sequence[str]) -> None:
    """Do it. DIR gets text/ (JSON lines, a file per cluster), tokenizer.json and presets/data/NAME.yaml.

    It appears when it is whole. Raises ConfigError where it is there already, DataError for too few documents.
    """
    folder = Path(asked.where).resolve()
    if folder.exists():
        raise ConfigError(f"cluster={asked.where} is there already; remove it, or choose another folder")
    if not folder.name[0].isalnum() or not folder.name.replace("-", "_").isidentifier():
        raise ConfigError(f"cluster={asked.where}: its last part becomes the data set's name; use letters, digits, '_'")
    need("sklearn.cluster")
    cfg = load([*asked.settings, f"seed={asked.seed}"], config_dirs=config_dirs, kinds=False)
    embedder: Embedder = ModelEmbedder(Path(asked.embed)) if asked.embed else WordEmbedder(asked.seed)
    prepare(cfg.data)
    data = TokenData.open(cfg.data.dir)
    places = list(documents(data))
    some = np.random.default_rng(asked.seed).permutation(len(places))[:SAMPLE]
    chosen = [places[i] for i in np.sort(some)]
    tokenizer = data.tokenizer()
    texts = [decode(data, tokenizer, place, LONGEST) for place in chosen]
    sizes = np.array([place.tokens for place in chosen])
    logger.info("clustering %d of %d documents", len(chosen), len(places))
    found = Clusters.learn(texts, sizes, asked.clusters, embedder, asked.seed)
    words = [""] * found.count
    if isinstance(embedder, WordEmbedder):
        words = embedder.typical(texts, found.of(texts), found.count)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counts, longest = write_text(partial / "text", data, places, found)
        shutil.copy(data.tokenizer_path, partial / "tokenizer.json")
        write_preset(partial, folder, cfg, counts, longest)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(table(counts, words))
    print(f"use it: moetrain train --config-dir {quote(f'{asked.where}/presets')} data={folder.name}")
    sizes_by_cluster = {name: count.total() for name, count in counts.items()}
    print(json.dumps({"clusters": sizes_by_cluster, "from": {name: dict(count) for name, count in counts.items()}}))


def documents(data: TokenData) -> Iterator[Place]:
    """All documents, those of the held-out parts too: which are held out is decided anew for the clusters."""
    for domain in data.sources:
        for split in SPLITS:
            lengths = data.documents(domain, split).astype(np.int64)
            starts = np.concatenate([[0], np.cumsum(lengths)])
            for start, tokens in zip(starts, lengths, strict=False):
                if tokens > 1:  # not only the token that ends it
                    yield Place(domain, split, int(start), int(tokens))


def decode(data: TokenData, tokenizer: Tokenizer, place: Place, longest: int | None = None) -> str:
    """The text of a document, or of its first ``longest`` tokens."""
    end = place.start + place.tokens - 1
    ids = data.tokens(place.domain, place.split)[place.start : min(end, place.start + (longest or end))]
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def write_text(
    out: Path, data: TokenData, places: Sequence[Place], found: Clusters
) -> tuple[dict[str, Counter[str]], int]:
    """A file of JSON lines for each cluster. Cluster -> tokens by the domain that they come from; bytes of the longest
    line."""
    out.mkdir()
    width = max(2, len(str(found.count - 1)))
    names = [f"c{number:0{width}d}" for number in range(found.count)]
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    tokenizer, longest = data.tokenizer(), 0
    files = {name: (out / f"{name}.jsonl").open("w", encoding="utf-8") for name in names}
    try:
        for first in tqdm(range(0, len(places), BATCH), desc="sort", unit_scale=BATCH, unit="doc", disable=None):
            batch = places[first : first + BATCH]
            heads = [decode(data, tokenizer, place, LONGEST) for place in batch]
            for place, number in zip(batch, found.of(heads), strict=True):
                entry = {"text": decode(data, tokenizer, place), "from": place.domain}
                line = json.dumps(entry, ensure_ascii=False) + "\n"
                longest = max(longest, len(line.encode("utf-8")))
                files[names[number]].write(line)
                counts[names[number]][place.domain] += place.tokens
    finally:
        for file in files.values():
            file.close()
    return {name: count for name, count in counts.items() if count}, longest


def write_preset(partial: Path, folder: Path, cfg: Config, counts: dict[str, Counter[str]], longest: int) -> None:
    """``presets/data/NAME.yaml``: the clusters as sources, the rest as in the data set that they come from."""
    licences = {name: source.licence for name, source in cfg.data.sources.items()}
    preset = {
        "name": folder.name,
        "dir": str(folder / "prepared"),
        "val_fraction": cfg.data.val_fraction,
        "max_line_mb": max(cfg.data.max_line_mb, 1 + longest // 1_000_000),
        "document_mask": cfg.data.document_mask,
        "tokenizer": {"path": str(folder / "tokenizer.json")},
        "sources": {
            name: {
                "paths": [str(folder / "text" / f"{name}.jsonl")],
                "licence": " AND ".join(sorted({licences[domain] for domain in count if licences[domain]})),
            }
            for name, count in counts.items()
        },
    }
    file = partial / "presets" / "data" / f"{folder.name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(preset, sort_keys=False, allow_unicode=True), encoding="utf-8")


def table(counts: dict[str, Counter[str]], words: Sequence[str]) -> str:
    """A line for each cluster, for people."""
    lines = [f"{'cluster':<9}{'tokens':>13}  from; typical words"]
    for (name, count), typical in zip(counts.items(), words, strict=False):
        total = count.total()
        domains = ", ".join(f"{domain} {100 * part / total:.0f}%" for domain, part in count.most_common(3))
        lines.append(f"{name:<9}{total:>13,}  {domains}" + (f"; {typical}" if typical else ""))
    return "\n".join(lines)
