"""Preparing in several processes: the same bytes, errors as in one, and nothing left running."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moetrain.config.errors import DataError
from moetrain.config.schema_data import SourceConfig
from moetrain.data import build
from moetrain.data.prepare import prepare
from moetrain.data.workers import Workers
from tests.data.conftest import config, write_corpus
from tests.data.test_prepare import contents


def test_the_number_of_processes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH_CHARS", 2000)  # some 40 batches
    sources = write_corpus(tmp_path / "text", documents=12)
    sources["food"].filter = "gopher"
    sources["again"] = SourceConfig(paths=[*sources["code"].paths, *sources["sea"].paths], delimiter="n")
    found = []
    for processes in (1, 2):
        cfg = config(tmp_path / str(processes), sources, processes=processes, deduplicate=True)
        assert prepare(cfg, progress=False).domains["again"].removed["duplicate"] > 10
        found.append(contents(Path(cfg.dir)))
    assert found[0] == found[1]


def test_a_killed_process_is_one_line() -> None:
    with Workers(2) as workers, pytest.raises(DataError, match=r"one of data.processes=2 processes was killed"):
        list(workers.map(os._exit, [(1, 7)]))  # type: ignore[arg-type, list-item]


def test_results_come_in_order_and_little_is_read_ahead() -> None:
    read = 0

    def batches() -> object:
        nonlocal read
        for i in range(40):
            read += 1
            yield i, ["x" * i]

    with Workers(2) as workers:
        for i, (key, result) in enumerate(workers.map(sorted, batches())):  # type: ignore[arg-type, var-annotated]
            assert key == i and result == ["x" * i] and read <= i + 4
