"""The live view of runs that grow, are cut, or are not there."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from rich.console import Console

from moetrain.config.errors import ConfigError
from moetrain.report.live import Tail, spark, watch
from tests.report.test_report import make_run


def shown(run: Path) -> str:
    out = io.StringIO()
    watch(run, Console(file=out, width=120))
    return out.getvalue()


def test_it_shows_how_far_a_run_is_and_how_it_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=30)
    (run / "config.yaml").write_text("train: {steps: 120}\n")
    text = shown(run)
    assert "step 30 of 120 (25%)" in text and "0:00:45 to go" in text  # 90 steps of half a second
    assert "█" in text and "resumed from" in text


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = Tail(file)
    tail.look()
    file.write_text('{"step": 1}\n{"st')
    tail.look()
    assert [row["step"] for row in tail.rows] == [1]
    with file.open("a") as more:
        more.write('ep": 2}\nnonsense\n{"step": 3}\n')
    tail.look()
    assert [row["step"] for row in tail.rows] == [1, 2, 3]
    file.write_text('{"step": 1}\n')  # cut by a resume
    tail.look()
    assert [row["step"] for row in tail.rows] == [1]


def test_a_long_run_is_read_line_by_line_and_its_lists_are_not_kept(tmp_path: Path) -> None:
    line = {"loss": 1.5, "load_max_over_mean_by_layer": [n / 7 for n in range(1000)]}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n} | line) + "\n" for n in range(200)))
    tail = Tail(tmp_path / "metrics.jsonl")
    tracemalloc.start()
    try:
        tail.look()
        assert tracemalloc.get_traced_memory()[1] < (tmp_path / "metrics.jsonl").stat().st_size / 4
    finally:
        tracemalloc.stop()
    assert tail.rows[-1] == {"step": 199, "loss": 1.5}


def test_runs_without_a_line_or_without_anything(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, says in (("empty", "no config.yaml"), ("none", "no such folder")):
        with pytest.raises(ConfigError, match=says):
            shown(tmp_path / name)
    (tmp_path / "empty" / "config.yaml").write_text("train: {steps: 5}\n")
    assert "no whole line" in shown(tmp_path / "empty")


def test_the_course_marks_what_is_not_finite() -> None:
    assert spark([0.0, 7.0, float("nan"), 3.0]) == "▁█!▄"
    assert len(spark(list(range(1000)))) <= 60
