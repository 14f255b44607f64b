"""``moetrain mixture`` from files to the last line, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.cli import main
from moetrain.mixture.predictors import PREDICTORS


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, dict[str, Any]]:
    """What a run that succeeds prints, and its last line."""
    assert main(["mixture", *words]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def edit(file: Path, change: Callable[[list[str]], list[str]]) -> None:
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")


def test_from_files_to_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = folder / "plot.png"
    out, last = run(capsys, f"fit={folder}", f"test={folder}", "draws=5000", f"plot={plot}", "target=mean", "rows=30")
    assert last["fit_rows"] == 30
    assert set(last["spearman"]["default"]) == {"web", "code", "books", "average", "mean"}
    assert last["spearman"]["default"]["web"] > 0.99
    assert last["predicted_loss"] < last["predicted_loss_of_prior"]
    settings = dict(re.findall(r"data\.sources\.(\w+)\.weight=(\S+)", out))
    assert {name: float(share) for name, share in settings.items()} == last["weights"]
    assert sum(last["weights"].values()) == pytest.approx(1)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_test_runs_have_no_influence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With their losses shuffled, all is bitwise the same but the scores; rows may come in any order."""
    words = [f"fit={folder}", f"test={folder}", "draws=2000", "target=code"]
    _, before = run(capsys, *words)
    losses = folder / "test_pile_loss_1m.csv"

    def shuffle(lines: list[str]) -> list[str]:
        order = np.random.default_rng(0).permutation(len(lines) - 1) + 1
        values = [lines[i].split(",", 1)[1] for i in order]
        return [lines[0], *(f"{i},{value}" for i, value in enumerate(values, 1))]

    edit(losses, shuffle)
    edit(folder / "train_pile_loss_1m.csv", lambda lines: [lines[0], *lines[:0:-1]])
    _, after = run(capsys, *words)
    assert after["spearman"]["default"]["code"] < 0.6 < before["spearman"]["default"]["code"]
    for one in (before, after):
        one.pop("spearman"), one.pop("seconds")
    assert after == before


def test_two_folders_or_two_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "other"
    other.mkdir()
    for kind in ("mixture", "pile_loss"):
        (folder / f"test_{kind}_1m.csv").rename(other / f"big_{kind}_1B.csv")
    pair = f"{folder}/train_mixture_1m.csv,{folder}/train_pile_loss_1m.csv"
    _, last = run(capsys, f"fit={pair}", f"test={other}", "draws=1000", "predictor=law", "target=metric/web_val_loss")
    assert last["target"] == "web"
    assert last["spearman"]["law"]["web"] > 0.999


def put(row: int, column: int, value: str) -> Callable[[list[str]], list[str]]:
    """A change of one cell."""

    def change(lines: list[str]) -> list[str]:
        cells = lines[row].split(",")
        cells[column] = value
        return [*lines[:row], ",".join(cells), *lines[row + 1 :]]

    return change


WRONG_FILES: list[tuple[str, Callable[[list[str]], list[str]], str]] = [
    (
        "train_mixture_1m.csv",
        put(3, 2, "nan"),
        r"train_mixture_1m.csv line 4: train_code is 'nan', not a finite number",
    ),
    ("train_mixture_1m.csv", put(3, 2, "-0.1"), r"line 4: train_code is -0.1; a weight is a share"),
    ("train_mixture_1m.csv", put(3, 2, "7"), r"line 4: the weights sum to 7\.\d+; give shares"),
    ("train_mixture_1m.csv", put(3, 0, "2"), r"line 4: index 2 is on line 3 too; delete one"),
    ("train_pile_loss_1m.csv", lambda lines: lines[:-1], r"line 41: index 40 is not in .*train_pile_loss_1m.csv"),
    ("train_pile_loss_1m.csv", put(5, 1, ""), r"line 6: metric/web_val_loss is '', not a finite number"),
    ("train_pile_loss_1m.csv", lambda lines: [*lines, "41,3"], r"line 42: 2 cells under 4 columns"),
    ("test_pile_loss_1m.csv", put(0, 0, "row"), r"line 1: no column is called 'index'"),
    ("test_pile_loss_1m.csv", put(0, 1, "metric/wbe_val_loss"), r"target 'wbe' is only in the test runs"),
    ("test_mixture_1m.csv", lambda lines: lines[:1], r"test_mixture_1m.csv: has no rows"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG_FILES, ids=[message for _, _, message in WRONG_FILES])
def test_wrong_files_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, change: Callable[[list[str]], list[str]], message: str
) -> None:
    edit(folder / name, change)
    assert main(["mixture", f"fit={folder}", f"test={folder}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predicter=law"], "no setting 'predicter'; did you mean 'predictor'"),
        (["predictor=lightgmb"], "no predictor is called 'lightgmb'; did you mean 'lightgbm'"),
        (["target=cod"], "no target is called 'cod'; did you mean 'code'"),
        (["rows=41"], "has only 40 runs"),
        (["rows=few"], "rows= takes a whole number"),
        (["cap=1"], "cap takes a number above 1"),
        (["plot=picture.txt"], "ends in .png"),
        (["fit=nowhere"], "given twice"),
    ],
)
def test_wrong_words_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["mixture", f"fit={folder}", f"test={folder}", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_folders_without_a_pair(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "test_pile_loss_60m.csv").write_text("index,a\n1,2\n")
    for words, message in (
        (
            [f"fit={folder}", f"test={folder}"],
            "found test_pile_loss_1m.csv, test_pile_loss_60m.csv; name the two files",
        ),
        (["fit=nowhere", f"test={folder}"], "there is no such folder"),
        ([f"test={folder}"], "give one of search, fit, cluster, collect"),
    ):
        assert main(["mixture", *words]) == 2
        assert message in capsys.readouterr().err


def test_without_test_runs_scores_come_from_cross_validation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs that follow a law, the law predicts those that it was not fitted to; of shuffled losses it cannot."""
    monkeypatch.setattr("moetrain.mixture.study.PREDICTORS", {"law": PREDICTORS["law"]})
    words = [f"fit={folder}", "draws=1000", "rows=25", "predictor=law"]
    _, last = run(capsys, *words)
    assert last["test_rows"] == 0
    assert last["spearman"]["law"]["web"] > 0.99

    def shuffle(lines: list[str]) -> list[str]:
        values = [line.split(",", 1)[1] for line in lines[1:]]
        values = [values[i] for i in np.random.default_rng(0).permutation(len(values))]
        return [lines[0], *(f"{i},{value}" for i, value in enumerate(values, 1))]

    edit(folder / "train_pile_loss_1m.csv", shuffle)
    _, last = run(capsys, *words)
    assert last["spearman"]["law"]["web"] < 0.6


def test_a_missing_package_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert main(["mixture", f"fit={folder}", f"test={folder}"]) == 2
    assert "needs lightgbm: pip install 'moetrain[mixture]'" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixture", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out
        for word in (
            "search=DIR",
            "fit=DIR",
            "test=DIR",
            "cluster=DIR",
            "collect=DIR",
            "target=",
            "predictor=",
            "rows=",
            "cap=",
            "plot=",
        )
    )
