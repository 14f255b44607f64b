"""The corpus that ships: small, whole, of known origin, and really of several domains."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from moetrain.config.schema_data import DataConfig
from moetrain.data.baselines import Unigram
from moetrain.data.dataset import TokenData
from moetrain.data.prepare import prepare

DEMO = Path(str(importlib.resources.files("moetrain"))) / "data" / "demo"
PRESET = Path(__file__).parents[2] / "configs" / "data" / "demo.yaml"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = tmp_path_factory.mktemp("demo") / "prepared"
    preset = yaml.safe_load(PRESET.read_text()) | {"dir": str(folder)}
    prepare(TypeAdapter(DataConfig).validate_python(preset), progress=False)
    return TokenData.open(folder, vocab_size=2048)


def test_files_are_those_of_the_provenance_and_under_2_mb() -> None:
    listed = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", (DEMO / "PROVENANCE.md").read_text(), flags=re.MULTILINE))
    listed = {name: digest for digest, name in listed.items()}
    files = {path.name: path for path in DEMO.iterdir() if path.suffix in (".txt", ".json")}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == listed
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 2_000_000


def test_tokenizer_loses_nothing(demo: TokenData) -> None:
    tokenizer = demo.tokenizer()
    for domain in demo.domains:
        text = (DEMO / f"{domain}.txt").read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
        assert 2.3 < demo.manifest.domains[domain].bytes_per_token < 3.5
    assert tokenizer.get_vocab_size() == 2048 and tokenizer.id_to_token(demo.eos_id) == "<|endoftext|>"


def test_each_domain_is_best_predicted_by_its_own_words(demo: TokenData) -> None:
    """Held-out text of a domain costs less under its own unigram model than under any other domain's, by a clear
    margin."""
    models = {d: Unigram(np.bincount(demo.tokens(d), minlength=2048)) for d in demo.domains}
    assert len(models) >= 3
    for domain in demo.domains:
        held_out = demo.tokens(domain, "val")
        cost = {d: model.cost(held_out, held_out).mean() for d, model in models.items()}
        assert min(cost, key=lambda d: float(cost[d])) == domain
        assert sorted(cost.values())[1] - cost[domain] > 0.1
