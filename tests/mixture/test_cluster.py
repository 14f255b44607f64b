"""Clusters against the topics that texts were made of."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moetrain.cli import main
from moetrain.config import load
from moetrain.data.prepare import prepare
from moetrain.mixture.cluster import merge_small
from moetrain.mixture.cluster_command import write_preset

TOPICS = {
    "sea": "wave ship sail harbour tide captain anchor storm",
    "food": "bread salt oven butter onion pepper kitchen recipe",
    "law": "court judge statute appeal clause verdict counsel",
}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of a data set of two sources, each with texts of all three topics."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for source in ("one", "two"):
        lines = []
        for number in range(90):
            topic = list(TOPICS)[number % 3]
            text = " ".join(rng.choice([*TOPICS[topic].split(), "the", "of", "and", "is"], 60))
            lines.append(json.dumps({"text": f"{text} \u00e9\n"}))
        (tmp_path / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    sources = [f"data.sources.{name}.paths=[{name}.jsonl]" for name in ("one", "two")]
    licences = ["data.sources.one.licence=MIT", "data.sources.two.licence=CC0-1.0"]
    return ["data=own", "data.name=mixed", "data.tokenizer.vocab_size=400", *sources, *licences]


def test_topics_become_domains(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three clusters, each of one topic, hold every text once, letter by letter; they are a data set of their own."""
    assert main(["mixture", "cluster=topics", "clusters=3", *words]) == 0
    out = capsys.readouterr().out
    assert "use it: moetrain train --config-dir topics/presets data=topics" in out
    files = sorted(Path("topics/text").iterdir())
    found = [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]
    given = "".join(Path(f"{name}.jsonl").read_text() for name in ("one", "two"))
    texts = [json.loads(line)["text"] for line in given.splitlines()]
    assert sorted(text for cluster in found for text in cluster) == sorted(texts)
    topics = [{name for name, about in TOPICS.items() if set(text.split()) & set(about.split())} for text in texts]
    by_text = dict(zip(texts, topics, strict=True))
    about = [set.union(*(by_text[text] for text in cluster)) for cluster in found]
    assert sorted(about, key=str) == [{"food"}, {"law"}, {"sea"}]
    cfg = load(["data=topics"], config_dirs=["topics/presets"], kinds=False)
    manifest = prepare(cfg.data)
    assert list(manifest.domains) == ["c00", "c01", "c02"]
    assert sum(info.train.documents + info.val.documents for info in manifest.domains.values()) == 180
    assert {info.licence for info in manifest.domains.values()} == {"CC0-1.0 AND MIT"}
    assert main(["mixture", "cluster=topics", *words]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["mixture", "cluster=other", "clusters=50", *words]) == 2
    assert "180 documents are too few for 50 clusters; give clusters=45" in capsys.readouterr().err
    assert main(["mixture", "cluster=other", "embed=topics", *words]) == 2
    assert "embed=topics: not a Hugging Face model" in capsys.readouterr().err
    assert not Path("other").exists()


def test_the_preset_lets_the_longest_line_through(words: list[str], tmp_path: Path) -> None:
    longest = 104_857_600
    write_preset(tmp_path, tmp_path / "topics", load(words, kinds=False), {"c00": Counter(one=1)}, longest)
    cfg = load(["data=topics"], config_dirs=[str(tmp_path / "presets")], kinds=False)
    assert cfg.data.max_line_mb * 1_000_000 >= longest


def test_small_clusters_join_the_nearest() -> None:
    """Four on a line at 0, 1, 10 and 11: those at 1 and 11 are small, one by tokens, one by documents."""
    centres = np.array([[0.0], [1.0], [10.0], [11.0]])
    fine = np.repeat([0, 1, 2, 3], [10, 10, 20, 2])
    sizes = np.where(fine == 1, 1, 100)
    merged = merge_small(np.arange(4), centres, fine, sizes, clusters=4)
    assert merged.tolist() == [1, 1, 0, 0]
