"""What prepare removes: exact duplicates, texts that break a rule of a quality filter, sources without a licence."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from moetrain.config.errors import DataError
from moetrain.config.schema import SourceConfig
from moetrain.data.dataset import TokenData
from moetrain.data.manifest import Manifest
from moetrain.data.prepare import prepare
from tests.data.conftest import config, write_corpus
from tests.data.test_prepare import documents_of


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def test_duplicates_are_removed_exactly_and_the_first_domain_keeps_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    pool = [f"text {n} " + "word " * (5 + n % 11) for n in range(400)]
    pool += [text + " " for text in pool[:50]]  # nearly the same is not the same
    texts = {name: [rng.choice(pool) for _ in range(300)] for name in ("first", "second", "third")}
    sources = {}
    for name, chosen in texts.items():
        half = len(chosen) // 2  # two files, so that copies lie in one file, in two, and in two domains
        write_lines(tmp_path / f"{name}1.jsonl", chosen[:half])
        write_lines(tmp_path / f"{name}2.jsonl", chosen[half:])
        sources[name] = SourceConfig(paths=[str(tmp_path / f"{name}*.jsonl")])
    cfg = config(tmp_path, sources)
    plain = prepare(cfg, progress=False)
    assert all(not domain.removed for domain in plain.domains.values()) and "removed" not in plain.table()
    cfg.deduplicate = True
    manifest = prepare(cfg, progress=False)
    assert manifest.recipe != plain.recipe and Manifest.load(Path(cfg.dir)) == manifest
    data, seen = TokenData.open(cfg.dir), set[str]()
    for name, chosen in texts.items():
        expected = []
        for text in chosen:
            if text not in seen:
                expected.append(text)
                seen.add(text)
        found = documents_of(data, name, "train") + documents_of(data, name, "val")
        assert sorted(found) == sorted(expected)
        removed = len(chosen) - len(expected)
        assert manifest.domains[name].removed == {"duplicate": removed} and removed > 50
        assert f"{name}: {removed} documents were removed: duplicate {removed}" in manifest.table()


def test_a_domain_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    sources = write_corpus(tmp_path / "text")
    cfg = config(tmp_path, {"sea": sources["sea"], "copy": sources["sea"]}, deduplicate=True)
    with pytest.raises(
        DataError, match=r"domain 'copy' has no text left: all its 30 documents .*\(duplicate 30\)"
    ) as error:
        prepare(cfg, progress=False)
    assert "\n" not in str(error.value) and not Path(cfg.dir).exists()
