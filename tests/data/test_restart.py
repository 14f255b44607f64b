"""A prepare that is killed at any instant is continued by the next call: the same bytes, and little is done twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.errors import DataError
from moetrain.config.schema_data import DataConfig, SourceConfig, TokenizerConfig
from moetrain.data import build, prepare, shards
from moetrain.data.dataset import TokenData
from tests.data.conftest import DELIMITER, config, contents, write_corpus

KILLS = 12
FORK = multiprocessing.get_context("fork")


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal entry for about every second document, and a note of every file, so that a small corpus has many
    instants."""
    monkeypatch.setattr(build, "BATCH_CHARS", 400)
    monkeypatch.setattr(build, "JOURNAL_BATCHES", 1)
    monkeypatch.setattr(build, "KEEP_SECONDS", 0)


def prepare_and_die(cfg: DataConfig, events: int, added: Any, surveyed: Any) -> None:
    """Prepare in a process that kills itself at one of its documents, file system syncs and renames. ``added``: shared
    count of documents that were written; ``surveyed``: of documents that were read for the first time."""
    left = [events]

    def counted(function: Callable[..., Any], count: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if count is not None:
                count.value += 1
            return function(*args, **kwargs)

        return call

    shards.ShardWriter.add = counted(shards.ShardWriter.add, added)  # type: ignore[method-assign]
    build.Build._why_removed = counted(build.Build._why_removed, surveyed)  # type: ignore[method-assign]
    os.fsync = counted(os.fsync)
    os.rename = counted(os.rename)
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    prepare.prepare(cfg, progress=False)


def in_files_of_ten(folder: Path, sources: dict[str, SourceConfig]) -> None:
    """Cut each source's file into files of ten documents."""
    for name, source in sources.items():
        documents = (folder / f"{name}.txt").read_text(encoding="utf-8").split(DELIMITER)
        for i in range(0, len(documents), 10):
            text = DELIMITER.join(documents[i : i + 10])
            (folder / f"{name}.{i:03}.txt").write_text(text, encoding="utf-8")
        source.paths = [str(folder / f"{name}.*.txt")]


GIVEN = TokenizerConfig(path="moetrain:data/demo/tokenizer.json")


@pytest.mark.parametrize("options", [{"tokenizer": GIVEN}, {"deduplicate": True}], ids=["given", "trained, duplicates"])
def test_killed_at_random_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    seed = int(os.environ.get("MOETRAIN_SEED", random.randrange(10**6)))
    print(f"MOETRAIN_SEED={seed}")
    rng = random.Random(seed)
    small_steps(monkeypatch)
    sources = write_corpus(tmp_path / "text", documents=15)
    in_files_of_ten(tmp_path / "text", sources)
    whole = config(tmp_path / "whole", sources, **options)
    manifest = prepare.prepare(whole, progress=False)
    documents = sum(info.train.documents + info.val.documents for info in manifest.domains.values())
    removed = sum(sum(info.removed.values()) for info in manifest.domains.values())
    cfg = config(tmp_path / "killed", sources, **options)
    added, surveyed, kills = FORK.Value("i"), FORK.Value("i"), 0
    while True:
        events = rng.randrange(1, 60) if kills < KILLS else 10**9
        process = FORK.Process(target=prepare_and_die, args=(cfg, events, added, surveyed))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if not Path(cfg.dir).exists():  # killed before the last rename: nothing half may be seen
            with pytest.raises(DataError, match="holds no prepared data"):
                TokenData.open(cfg.dir)
    assert contents(Path(cfg.dir)) == contents(Path(whole.dir))
    assert kills >= 3
    assert documents <= added.value <= documents + 3 * kills  # a batch holds one document or a few
    assert surveyed.value <= documents + removed + 10 * kills


@pytest.mark.parametrize("change", ["text", "recipe", "journal", "shard"])
def test_what_no_longer_holds_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Stopped in the last shards; then the text, a setting, or what was kept is changed behind its back."""
    small_steps(monkeypatch)
    sources = write_corpus(tmp_path / "text", documents=10)
    cfg = config(tmp_path / "killed", sources)
    process = FORK.Process(target=prepare_and_die, args=(cfg, 100, FORK.Value("i"), FORK.Value("i")))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    partial = Path(cfg.dir).with_name(".prepared.partial")
    journals = list((partial / ".progress").glob("*.journal"))
    assert journals
    if change == "text":
        file = next(path for path in (tmp_path / "text").rglob("*") if path.is_file())
        file.write_text(file.read_text(encoding="utf-8") + "more", encoding="utf-8")
    elif change == "recipe":
        cfg.val_fraction = 0.3
    elif change == "journal":
        for journal in journals:
            journal.write_bytes(journal.read_bytes()[:-5])
    else:
        for shard in partial.glob("*.bin"):
            os.truncate(shard, shard.stat().st_size // 4 * 2)
    prepare.prepare(cfg, progress=False)
    fresh = config(tmp_path / "fresh", sources, val_fraction=cfg.val_fraction)
    prepare.prepare(fresh, progress=False)
    assert contents(Path(cfg.dir)) == contents(Path(fresh.dir))
