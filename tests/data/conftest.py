"""A small corpus of three domains, made here: words of each domain's own, so that the domains differ."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moetrain.config.schema_data import DataConfig, SourceConfig, TokenizerConfig
from moetrain.data.dataset import TokenData
from moetrain.data.prepare import prepare

WORDS = {
    "sea": "wave ship sail rope harbour storm captain anchor tide gull",
    "code": "def return if else for in range(n): x = y + 1 # loop",
    "food": "bread soup pepper onion boil the stir a slice of cheese",
}
DELIMITER = "%%\n"


def document(domain: str, number: int) -> str:
    """Document ``number`` of a domain: 5 to 60 lines of its words."""
    rng = random.Random(f"{domain}{number}")
    words = WORDS[domain].split()
    lines = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(rng.randint(5, 60))]
    return f"{domain} {number}\n" + "\n".join(lines) + "\n"


def write_corpus(folder: Path, documents: int = 30) -> dict[str, SourceConfig]:
    """One file per domain under ``folder``; its sources."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {}
    for i, domain in enumerate(WORDS):
        text = DELIMITER.join(document(domain, n) for n in range(documents * (i + 1)))
        (folder / f"{domain}.txt").write_text(text, encoding="utf-8")
        sources[domain] = SourceConfig(paths=[str(folder / f"{domain}.txt")], licence="CC0-1.0", delimiter="^%%\n")
    return sources


def config(tmp_path: Path, sources: dict[str, SourceConfig], vocab_size: int = 400, **others: object) -> DataConfig:
    """A data config that keeps its shards in ``tmp_path/prepared``."""
    tokenizer = TokenizerConfig(path=None, vocab_size=vocab_size)
    options = {"name": "test", "dir": str(tmp_path / "prepared"), "sources": sources, "tokenizer": tokenizer} | others
    return DataConfig(**options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """The small corpus, prepared and opened."""
    folder = tmp_path_factory.mktemp("data")
    cfg = config(folder, write_corpus(folder / "text"))
    prepare(cfg, progress=False)
    return TokenData.open(cfg.dir)
