"""The page of runs that ended, are being written, were killed, or are no runs; its pictures read back by others."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.config.errors import ConfigError
from moetrain.report import read, write_report
from moetrain.report.experts import coactivation, overlap
from moetrain.report.read import read_run
from moetrain.report.svg import MOST_POINTS, Line, chart, png, thin, ticks


def make_run(folder: Path, steps: int = 30, loss: float = 4.0) -> Path:
    """A run directory as training writes it, with numbers that are easy to know again."""
    (folder / "checkpoints" / "step-20").mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "tokens": 256 * step,
            "loss": loss - step / 100,
            "grad_norm": 1 / step,
            "lr": 1e-3,
            "step_s": 0.5,
            "data_wait_s": 0.05,
            "tokens_per_s": 512.0,
            "load_max_over_mean_by_layer": [1.5, 1.25],
            "read_by_domain": {"code": 6 * step, "books": 2 * step},
        }
        if step == 20:
            row["events"] = [{"event": "save", "step": 20}, {"event": "skipped", "step": 20}]
        if step % 10 == 0:
            row |= {"val_loss": loss - step / 50, "val_loss_by_domain": {"code": 3.0, "books <&>": 4.0}}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(f"seed: {steps}\nmodel: {{name: toy}}\ntrain: {{steps: {steps}}}\n")
    (folder / "log.txt").write_text("2026 INFO resumed from /a/b/checkpoints/step-20\n")
    (folder / "summary.json").write_text('{"exit_reason": "finished", "params_total": 1000000, "params_active": 5000}')
    return folder


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would load and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_of_a_run_needs_nothing_else_and_shows_what_was_recorded(tmp_path: Path) -> None:
    out = write_report([make_run(tmp_path / "toy-run")])
    assert out == tmp_path / "toy-run" / "report.html"
    page = Page(out.read_text())
    text = " ".join(page.text)
    assert all(address.startswith("data:") for address in page.loads)
    assert "script" not in page.tags
    for words in ("Training loss", "Held-out loss", "Gradient norm", "Waiting for data", "Mixture as it was read",
                  "Fullest expert by layer", "books <&>", "resumed from step 20", "checkpoint of step 20",
                  "1M / 5k", "30 of 30", "3.7000", "finished"):  # fmt: skip
        assert words in text, words
    marks = re.findall(r'"mark (\w+)"', out.read_text().split("</svg>")[0])
    assert marks == ["restart", "save", "event"]  # a save that its folder and the metrics tell of is one
    for drawing in re.findall(r"<svg.*?</svg>", out.read_text()):
        ET.fromstring(drawing)


def test_runs_beside_each_other_say_in_what_they_differ(tmp_path: Path) -> None:
    """Two runs of the same name in different folders; then the same as a sweep, the better one first."""
    runs = [make_run(tmp_path / "a" / "run", loss=4.0), make_run(tmp_path / "b" / "run", steps=40, loss=3.0)]
    text = " ".join(Page(write_report(runs, tmp_path / "both.html").read_text()).text)
    assert "a/run" in text and "b/run" in text
    assert "Settings that differ" in text and "train.steps" in text and "model.name" not in text
    sweep = tmp_path / "sweep"
    make_run(sweep / "000", loss=4.0)
    make_run(sweep / "001", loss=3.0)
    (sweep / "sweep.yaml").write_text("runs: {}\n")
    text = " ".join(Page(write_report([sweep]).read_text()).text)
    assert text.index("001") < text.index("000")


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    """metrics.jsonl ends in half a line, with bytes that are no text, and a step is there twice after a resume."""
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 30, "loss": 1.25}\n{"step": 31, "lo\xff\xfe')
    (run / "config.yaml").write_text("model: {name: [")
    (run / "summary.json").write_text('{"exit_rea')
    found = read_run(run)
    assert found.last("loss") == 1.25 and len(found.rows) == 30
    text = " ".join(Page(write_report([run]).read_text()).text)
    assert "metrics.jsonl: 1 line cut or damaged" in text
    assert "config.yaml: missing or damaged" in text and "no summary.json" in text


def test_a_loss_that_is_not_finite_breaks_the_line_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": NaN, "grad_norm": Infinity}\n{"step": 32, "loss": 2.0, "grad_norm": 0.0}\n')
    page = write_report([run]).read_text()
    Page(page)
    assert "nan" not in "".join(re.findall(r'<path class="line"[^>]*>', page))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda run: None, "no such folder"),
        (lambda run: run.mkdir(), "no metrics.jsonl"),
        (lambda run: (run.mkdir(), (run / "metrics.jsonl").touch()), "no whole line yet"),
        (lambda run: (run.mkdir(), (run / "metrics.jsonl").write_text('{"step": 1, "lo')), "no whole line yet"),
        (lambda run: (run.mkdir(), (run / "sweep.yaml").touch()), "no run of this sweep"),
    ],
)
def test_what_is_no_run_is_one_line(make: Any, says: str, tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(ConfigError, match=says) as error:
        write_report([tmp_path / "run"])
    assert str(tmp_path / "run") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("out", "says"), [("no/such/page.html", "choose another file with --out"), ("", "a folder")])
def test_a_page_that_cannot_be_written(out: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        write_report([make_run(tmp_path / "run")], Path(out))


def test_pictures_are_what_another_reader_of_png_sees() -> None:
    from matplotlib.image import imread

    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    address = png(rgb)
    read = imread(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert (np.round(read * 255).astype(np.uint8) == rgb).all()


def test_a_long_line_is_thinned_and_keeps_its_spike() -> None:
    x = np.arange(100_000.0)
    y = np.zeros(100_000)
    y[54_321] = 9.0
    points = thin(list(x), list(y))
    assert len(points) <= MOST_POINTS and (54_321.0, 9.0) in points
    assert [p[0] for p in points] == sorted(p[0] for p in points)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0313, 0.0317), (-3, 1e6), (5e-9, 6e-9), (1, 1.0001)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = [value for value, _ in ticks(low, high)]
    slack = (high - low) * 1e-6
    assert 2 <= len(found) <= 7 and low - slack <= min(found) and max(found) <= high + slack


def test_flat_empty_and_single_charts_are_drawn() -> None:
    assert chart("nothing", [Line("a", [], [])]) == ""
    for y in ([0.0], [3.0, 3.0], [float("nan")], [0.0, 0.0]):
        for log in (False, True):
            Page(chart("some", [Line("a", list(range(1, len(y) + 1)), y)], log=log))


def test_experts_chosen_together_by_counting() -> None:
    """Against counting with loops, as OLMoE defines it; -1 is a choice that capacity dropped."""
    ids = np.array([[0, 1], [0, 2], [1, 0], [2, -1]])
    found = coactivation(ids, 4)
    for i in range(4):
        mine = [set(row) for row in ids.tolist() if i in row]
        for j in range(4):
            if i == j or not mine:
                assert np.isnan(found[i, j])
            else:
                assert found[i, j] == pytest.approx(sum(j in row for row in mine) / len(mine))


def test_saturation_does_not_care_for_the_order_of_choices() -> None:
    assert overlap(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 5]])) == pytest.approx(3 / 4)


def test_of_a_very_long_run_lists_are_read_of_some_lines_and_the_rest_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", steps=400)
    monkeypatch.setattr(read, "MOST_BYTES", (folder / "metrics.jsonl").stat().st_size // 20 + 1)
    run = read_run(folder)
    assert len(run.series("loss")[0]) == 400 and len(run.series("val_loss_by_domain/code")[0]) == 40
    by_layer = run.series("load_max_over_mean_by_layer/1")[0]
    assert by_layer == [step for step in range(1, 401) if step % 20 == 1 or step % 10 == 0]
    assert [kind for _, kind, _ in run.events] == ["restart", "save", "event"]
