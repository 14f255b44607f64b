"""Sources grouped in domains: in the manifest, without preparing again when only the grouping changes, and in the
baselines of held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.data.asked import domains_of
from moetrain.data.baselines import baselines
from moetrain.data.dataset import TokenData
from moetrain.data.manifest import Manifest
from moetrain.data.prepare import prepare
from tests.data.conftest import config, write_corpus


def test_grouping_is_in_the_manifest_and_changes_without_preparing_again(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    prepare(cfg, progress=False)
    flat = TokenData.open(cfg.dir)
    made = (flat.dir / "sea.train.bin").stat().st_mtime_ns
    assert flat.domains == flat.sources == ["sea", "code", "food"]

    cfg.sources["code"].domain = cfg.sources["food"].domain = "land"
    assert TokenData.open(cfg.dir, domain_of=domains_of(cfg)).domains == ["sea", "land"]  # the config's word counts
    prepare(cfg, progress=False)
    assert {n: info.domain for n, info in Manifest.load(flat.dir).domains.items()} == {
        "sea": "", "code": "land", "food": "land"}  # fmt: skip
    grouped = TokenData.open(cfg.dir)
    assert grouped.domains == ["sea", "land"] and grouped.sources == flat.sources
    assert (flat.dir / "sea.train.bin").stat().st_mtime_ns == made

    apart, together = baselines(flat).by_domain, baselines(grouped).by_domain
    parts = [apart["code"], apart["food"]]
    tokens = sum(part.tokens for part in parts)
    assert together["sea"] == apart["sea"] and together["land"].tokens == tokens
    assert together["land"].bigram == pytest.approx(sum(part.bigram * part.tokens for part in parts) / tokens)
