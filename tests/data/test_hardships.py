"""What befalls data from outside: a full disk, files that change under a running job, limits of the system."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.config.errors import DataError
from moetrain.data.dataset import TokenData
from moetrain.data.loader import Loader
from moetrain.data.prepare import prepare
from moetrain.data.sampler import Sampler
from tests.data.conftest import config, contents, write_corpus


def in_process(work: Callable[[], str]) -> str:
    """What ``work`` returns in a process of its own, where limits may be lowered."""
    fork = multiprocessing.get_context("fork")
    queue: Any = fork.SimpleQueue()
    process = fork.Process(target=lambda: queue.put(work()))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return queue.get()


def test_a_disk_that_fills_up_loses_nothing_and_the_next_call_goes_on(tmp_path: Path) -> None:
    """The system refuses to let any file grow past a limit, lower and lower in the pass: writes fail where they do."""
    cfg = config(tmp_path, write_corpus(tmp_path / "text"), vocab_size=300)
    prepare(cfg, progress=False)
    before = contents(Path(cfg.dir))
    cfg.val_fraction = 0.1

    def fill(limit: int) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            prepare(cfg, progress=False)
        except DataError as error:
            return str(error)
        return "no error"

    largest = max(path.stat().st_size for path in Path(cfg.dir).glob("*.bin"))
    for limit in (100, 8_000, largest // 2):
        message = in_process(lambda limit=limit: fill(limit))  # type: ignore[misc]
        assert "cannot write prepared data to" in message and "file too large" in message and "\n" not in message
        assert contents(Path(cfg.dir)) == before
    prepare(cfg, progress=False)
    fresh = config(tmp_path / "fresh", cfg.sources, vocab_size=300, val_fraction=0.1)
    prepare(fresh, progress=False)
    assert contents(Path(cfg.dir)) == contents(Path(fresh.dir))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_shard_cut_short_under_a_loader_is_one_line_at_the_step_that_needs_it(tmp_path: Path, prefetch: int) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    prepare(cfg, progress=False)
    data = TokenData.open(cfg.dir)
    loader = Loader(data, Sampler(data, 0, None, 32), global_batch=8, micro_batch=4, prefetch=prefetch)
    loader.step(0)
    for path in Path(cfg.dir).glob("*.train.bin"):
        os.truncate(path, 0)
    with pytest.raises(DataError, match=r"train.bin' became shorter while it was in use: .*; restore it") as error:
        for step in range(1, 5):
            loader.step(step)
    assert "\n" not in str(error.value)
    loader.close()


def test_a_manifest_that_does_not_match_its_shards_is_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_corpus(tmp_path / "text"))
    manifest = prepare(cfg, progress=False)
    folder = Path(cfg.dir)
    sea = manifest.domains["sea"]
    fewer = dataclasses.replace(sea, train=dataclasses.replace(sea.train, tokens=sea.train.tokens - 1))
    for changed, message in [
        (dataclasses.replace(manifest, domains=manifest.domains | {"sea": fewer}), "its manifest says"),
        (dataclasses.replace(manifest, domains=manifest.domains | {"lake": sea}), "lake.train.idx' is missing"),
        (dataclasses.replace(manifest, vocab_size=100_000), "holds uint16 ids, .* 100000 tokens need int32"),
        (dataclasses.replace(manifest, tokenizer_sha256="0" * 64), "tokenizer.json' is damaged"),
    ]:
        changed.save(folder)
        with pytest.raises(DataError, match=message) as error:
            TokenData.open(folder)
        assert "\n" not in str(error.value)
    manifest.save(folder)
    ids = np.fromfile(folder / "sea.train.bin", dtype="<u2")
    ids[5] += 1  # the same size: only the hash tells
    ids.tofile(folder / "sea.train.bin")
    with pytest.raises(DataError, match=r"sea.train.bin' is damaged \(its SHA-256"):
        TokenData.open(folder)


def test_more_sources_than_files_may_be_open(tmp_path: Path) -> None:
    """Four hundred sources keep 1,600 files open; the usual limit of a process is 1,024."""
    cfg = config(tmp_path, write_corpus(tmp_path / "text", documents=4))
    manifest = prepare(cfg, progress=False)
    sea = manifest.domains["sea"]
    for i in range(400):
        for path in Path(cfg.dir).glob("sea.*"):
            os.link(path, path.with_name(path.name.replace("sea.", f"s{i}.")))
    many = dataclasses.replace(manifest, domains={f"s{i}": sea for i in range(400)})
    many.save(Path(cfg.dir))

    def count() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        data = TokenData.open(cfg.dir, verify=True)
        return str(sum(len(data.tokens(source)) for source in data.sources))

    assert in_process(count) == str(400 * sea.train.tokens)
