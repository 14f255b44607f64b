"""The end of a run whose disk is full by then."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from moetrain_launch.fork import run_ranks

from moetrain.comm.ranks import RankError
from moetrain.data.prepare import prepare
from moetrain.sweep.plan import exit_reason
from moetrain.train.finish import finish
from tests.train.test_training import build, load


def test_an_export_that_fails_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the summary of the run, which has finished, nor what an earlier end of it had exported."""
    cfg = load(tmp_path, "export.verify=false", "generate.prompts=[]", "log.tensorboard=false", "log.progress=false")
    prepare(cfg.data, progress=False)
    run_dir, exported = tmp_path / "run", tmp_path / "run/export/model.safetensors"
    run_dir.mkdir()

    def end(steps: int) -> str:
        """Train until then, and export; what was wrong with it."""
        cfg.train.steps = steps
        trainer = build(cfg)
        trainer.resume()
        evaluation = trainer.fit()
        assert evaluation is not None
        try:
            finish(trainer, evaluation)
        except RankError as error:
            return str(error)
        return ""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert run_ranks(1, end, 1) == [""]
    before = exported.read_bytes()
    (run_dir / "summary.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("moetrain.convert.export._write_shards", full)
        [said] = run_ranks(1, end, 2)
    assert "No space left" in said and f"moetrain train --resume {run_dir}" in said
    assert exit_reason(run_dir) == "finished" and exported.read_bytes() == before
    assert run_ranks(1, end, 2) == [""] and exported.read_bytes() != before
