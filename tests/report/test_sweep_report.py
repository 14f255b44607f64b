"""The page of a sweep: ranks, the plot across the keys, what a key explains, the scaling law; half-written sweeps."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import yaml

from moetrain.config.errors import ConfigError
from moetrain.report import write_report
from moetrain.report.parallel import places
from moetrain.report.sweep import importance, ranks
from tests.report.test_report import Page


def make_run(run: Path, value: float | None, reason: str | None, params: int = 1000, tokens: int = 4096) -> None:
    """A run directory with what a sweep's page reads."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\nmodel: {name: toy}\n")
    if value is not None:
        rows = [{"step": s, "loss": value + 1 / s, "tokens": tokens * s // 4, "val_loss": value} for s in (1, 2, 4)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if reason is not None:
        (run / "summary.json").write_text(json.dumps({"exit_reason": reason, "params_active": params}))


def make_sweep(folder: Path, **settings: str) -> Path:
    """Five runs over lr and a name: two finished, one pruned with a better value, one failed, one not begun."""
    runs = {}
    for n, (lr, kind) in enumerate([("0.001", "wsd"), ("0.01", "cosine"), ("0.1", "wsd"), ("3", "a<b"), ("2", "wsd")]):
        runs[f"{n:03d}"] = ["seed=1", f"optim.lr={lr}", f"schedule.kind={kind}", f"run_dir={folder}"]
    make_run(folder / "000", 3.5, "finished")
    make_run(folder / "001", 3.25, "finished")
    make_run(folder / "002", 3.0, "pruned by median at step 4, val_loss 3")
    make_run(folder / "003", None, "cannot run: no")
    table = {"sweep_version": 1, "config_dirs": ["/p q"], "sweep": {"sampler": "random", **settings}, "runs": runs}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(table))
    return folder


def cells(page: str) -> list[list[str]]:
    """The rows of the first table."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("</table>")[0])
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_runs_are_ranked_and_the_best_can_be_run_again(tmp_path: Path) -> None:
    """Finished ones first, then the one that was stopped early, whatever its value; each line with its words."""
    text = write_report([make_sweep(tmp_path / "s")]).read_text()
    Page(text)
    rows = cells(text)
    assert rows[0] == ["", "run", "val_loss", "optim.lr", "schedule.kind", "step", "ended"]
    assert [row[1] for row in rows[1:]] == ["001", "000", "002", "003", "004"]
    assert rows[1] == ["1", "001", "3.2500", "0.01", "cosine", "4", "finished"]
    assert rows[4][2:] == ["", "3", "a&lt;b", "", "cannot run: no"] and rows[5][-1] == "not begun"
    assert "moetrain train --config-dir &#x27;/p q&#x27; seed=1 optim.lr=0.01 schedule.kind=cosine<" in text
    assert "5 runs by random: 2 finished, 1 stopped early, 2 not finished" in text
    for drawing in re.findall(r"<svg.*?</svg>", text):
        ET.fromstring(drawing)


def test_a_high_metric_can_be_good(tmp_path: Path) -> None:
    rows = cells(write_report([make_sweep(tmp_path / "s", goal="max")]).read_text())
    assert [row[1] for row in rows[1:3]] == ["000", "001"]


def test_a_metric_that_no_run_has_is_said_on_the_page(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "my sweep", metric="nothing")
    text = " ".join(Page(write_report([sweep]).read_text()).text)
    assert "No run has written nothing, so there is no rank" in text and "Training loss" not in text
    assert f"moetrain train -m --resume '{sweep}' sweep.metric=NAME" in text


@pytest.mark.parametrize("text", ["runs: [", "- 3\n", "runs: 5\n", "runs: {'000': 7}\n"])
def test_a_damaged_sweep_file_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"sweep\.yaml is damaged"):
        write_report([tmp_path])


def test_places_on_an_axis() -> None:
    """Numbers by their value, over a wide range by its logarithm; names evenly."""
    assert places(["1", "2", "3", None])[0] == [0, 0.5, 1, None]
    assert places(["1e-4", "1e-3", "1e-2"])[0] == pytest.approx([0, 0.5, 1])
    assert places(["wsd", "cosine", "wsd"]) == ([0.75, 0.25, 0.75], [(0.25, "cosine"), (0.75, "wsd")])
    assert places(["5", "5"])[0] == [0.5, 0.5]
    assert [label for _, label in places(["1", "1.01", "2"])[1]] == ["1", "2"]  # none over another


def test_a_key_weighs_what_it_explains() -> None:
    """A learning rate with its optimum in the middle, which a straight line would not see; a name; and noise."""
    rng = np.random.default_rng(0)
    lr = 10 ** rng.uniform(-5, -1, 60)
    loss = (np.log10(lr) + 3) ** 2
    assert importance([repr(value) for value in lr.tolist()], loss) > 0.9  # type: ignore[operator]
    kind = ["a" if value < 1 else "b" for value in loss]
    assert importance(kind, loss) > 0.5  # type: ignore[operator]
    assert importance([str(value) for value in rng.permutation(60)], loss) < 0.2  # type: ignore[operator]
    assert importance(["1", "2", "3"], np.arange(3.0)) is None
    scipy_stats = pytest.importorskip("scipy.stats")
    values = rng.integers(0, 9, 40).astype(float)
    assert ranks(values) == pytest.approx((scipy_stats.rankdata(values) - 1) / 39)


@pytest.mark.parametrize("falls", [True, False])
def test_a_ladder_shows_its_law_and_what_it_says_of_a_larger_size(falls: bool, tmp_path: Path) -> None:
    """Four sizes by three lengths with losses of a known law: the page has its numbers and its prediction. Where larger
    ones are no better, it says that nothing is to be had from it."""
    pytest.importorskip("scipy")
    runs = {}
    for n, (size, tokens) in enumerate(
        (s, t) for s in (10**5, 2 * 10**5, 4 * 10**5, 8 * 10**5) for t in (2**16, 2**17, 2**18)
    ):
        loss = 2 + 50 / size**0.3 + 100 / tokens**0.4 if falls else 2 + 100 / tokens**0.4 + 1e-9 * size**0.9
        make_run(tmp_path / "s" / f"{n:03d}", loss, "finished", size, tokens)
        runs[f"{n:03d}"] = [f"ladder={size}", f"train.steps={tokens}"]
    (tmp_path / "s/sweep.yaml").write_text(yaml.safe_dump({"sweep_version": 1, "runs": runs}))
    text = " ".join(Page(write_report([tmp_path / "s"]).read_text()).text)
    assert ("The power of N is at a limit of the fit" in text) == (not falls)
    if not falls:
        return
    assert "L = 2.000" in text and "0.300" in text and "0.400" in text
    assert f"{2 + 50 / 8e6**0.3 + 100 / (2**18) ** 0.4:.3f}" in text
    assert re.search(r"fitted without the largest size, the law tells its losses to 0\.0\d%", text)
