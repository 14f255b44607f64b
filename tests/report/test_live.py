"""The live view of runs that grow, are cut, or are not there."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moetrain.config.errors import ConfigError
from moetrain.report.live import Course, Tail, spark, watch
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
    file.write_text('{"step": 1, "loss": 1}\n{"st')
    tail.look()
    assert tail.last["step"] == 1
    with file.open("a") as more:
        more.write('ep": 2, "loss": 2}\nnonsense\n{"step": 3, "loss": null}\n')
    tail.look()
    assert tail.last["step"] == 3 and tail.courses["loss"].means() == [1, 2]
    file.write_text('{"step": 1, "loss": 1}\n')  # cut by a resume
    tail.look()
    assert tail.last["step"] == 1 and tail.courses["loss"].means() == [1]


def test_a_long_run_is_read_line_by_line_and_none_is_kept(tmp_path: Path) -> None:
    line = {"loss": 1.5, "load_max_over_mean_by_layer": [n / 7 for n in range(1000)]}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n} | line) + "\n" for n in range(200)))
    tail = Tail(tmp_path / "metrics.jsonl")
    tracemalloc.start()
    try:
        tail.look()
        assert tracemalloc.get_traced_memory()[1] < (tmp_path / "metrics.jsonl").stat().st_size / 4
    finally:
        tracemalloc.stop()
    assert tail.last["step"] == 199


@pytest.mark.parametrize("count", [1, 60, 61, 119, 120, 121, 100_003])
def test_a_course_is_that_of_all_values(count: int) -> None:
    """Of however many; each mean is numpy's."""
    course, values = Course(), np.random.default_rng(count).normal(size=count)
    for value in values:
        course.add(value)
    means, size = course.means(), 1
    while -(-count // size) > len(means):
        size *= 2
    assert len(means) <= 120 and course.last == values[-1]
    assert means == pytest.approx([values[i : i + size].mean() for i in range(0, count, size)])


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
