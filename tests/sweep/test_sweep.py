"""Sweeps of a stand-in for training (conftest.py): each run in its directory, stopped, continued, pruned, at once.

The stand-in's loss is 3 + (log10 lr + 3)^2 + 1/step, so lr = 1e-3 is best.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import yaml

from moetrain import cli
from moetrain.config import read
from moetrain.sweep.chooser import Chooser
from moetrain.sweep.plan import plan_sweep
from moetrain.sweep.space import axes, space_of

Started = Callable[[str], list[str]]


def test_a_grid_runs_each_combination_in_a_directory_of_its_own(
    capsys: pytest.CaptureFixture[str], started: Started
) -> None:
    """A run that fails does not stop the others, and is named at the end; the best one is named too."""
    words = ["train", "-m", "optim.lr=7", "seed=1,2", "optim.lr=0.01,5,0.001", "train.steps=3", "run_dir=s"]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "2 of 6 runs of the sweep s failed: 001, 004" in err
    assert "best is run 002, val_loss 3.3333: optim.lr=0.001 seed=1" in out
    cfgs = [read(f"s/{n:03d}/config.yaml") for n in range(6)]
    assert [(cfg.seed, cfg.optim.lr) for cfg in cfgs] == [(s, lr) for s in (1, 2) for lr in (0.01, 5, 0.001)]
    assert [cfg.run_dir for cfg in cfgs] == [f"s/{n:03d}" for n in range(6)]
    table = yaml.safe_load(Path("s/sweep.yaml").read_text())
    assert table["runs"]["002"] == ["optim.lr=7", "seed=1", "optim.lr=0.001", "train.steps=3", "run_dir=s"]
    for again, says in (
        (words, "s already holds a sweep"),
        (["train", "run_dir=s"], "s holds a sweep; choose another run_dir"),
        (["train", "--resume", "s"], "--resume s: this is a sweep; give one of its runs"),
    ):
        assert cli.main(again) == 2
        assert says in capsys.readouterr().err
    assert started("s") == [f"{n:03d}" for n in range(6)]


def test_a_sweep_that_was_stopped_goes_on(capsys: pytest.CaptureFixture[str], started: Started) -> None:
    """The second run gets the sweep a SIGTERM: it saves, the sweep asks for requeue (85) and later goes on with that
    run and the one that had not begun; the first is left as it is. The words' own presets are still known."""
    Path("mine/few").mkdir(parents=True)
    for number, seed in enumerate((1, 66, 3)):
        Path(f"mine/few/m{number}.yaml").write_text(f"# @package _global_\nseed: {seed}\n")
    words = ["--config-dir", "mine", "+few=glob(m*)", "train.steps=2", "run_dir=s"]
    assert cli.main(["train", "-m", *words]) == 85
    assert "to go on: moetrain train -m --resume s" in capsys.readouterr().err
    assert not Path("s/001/summary.json").exists() and not Path("s/002").exists()
    assert cli.main(["train", "-m", "--resume", "s"]) == 0
    assert started("s") == ["000", "001", "001", "002"]
    assert cli.main(["train", "-m", "--resume", "s", "seed=1"]) == 2
    assert "takes only settings of the sweep itself" in capsys.readouterr().err


def test_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that wait for each other end only if both are at work; each has its share of the cores."""
    pytest.importorskip("joblib")
    monkeypatch.setenv("MEET", "1")
    sweep = ["sweep.launcher=joblib", "sweep.jobs=2"]
    assert cli.main(["train", "-m", "seed=1,2", "train.steps=2", "run_dir=s", *sweep]) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [read(f"s/00{n}/config.yaml").train.threads for n in range(2)] == [threads, threads]
    assert Path("s/000/output.txt").exists()


@pytest.mark.parametrize(
    ("count", "visible", "shares"), [(4, None, ["0,1", "2,3"]), (4, "3,5,6,7", ["3,5", "6,7"]), (2, None, ["0,1"] * 2)]
)
def test_each_of_several_runs_has_its_share_of_the_gpus(
    count: int, visible: str | None, shares: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks each, on a machine that is said to have ``count`` GPUs. In turn, where there are too few."""
    pytest.importorskip("joblib")
    monkeypatch.setenv("MEET", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sweep = ["sweep.launcher=joblib", "sweep.jobs=2", "launch.ranks=2"]
    assert cli.main(["train", "-m", "seed=1,2", "train.steps=2", "run_dir=s", *sweep]) == 0
    assert sorted(Path(f"s/00{n}/gpus").read_text() for n in range(2)) == shares


def test_jobs_of_submitit_on_this_machine() -> None:
    pytest.importorskip("submitit")
    sweep = ["sweep.launcher=submitit_local", "launch.slurm.time=10"]
    assert cli.main(["train", "-m", "optim.lr=0.01,5", "train.steps=2", "run_dir=s", *sweep]) == 1
    assert json.loads(Path("s/000/summary.json").read_text())["exit_reason"] == "finished"
    assert list(Path("s/submitit").glob("*_log.out"))


@pytest.mark.parametrize("prune", ["median", "halving"])
def test_a_bad_run_is_stopped_in_the_middle(prune: str, capsys: pytest.CaptureFixture[str], started: Started) -> None:
    """Four good runs, then one with a bad learning rate that would wait a minute in its middle, then a good one. The
    directory of the bad one says so, it is no failure, and to go on does not run it again."""
    pytest.importorskip("optuna")
    words = ["few=glob(m*)", "train.steps=8", "train.eval_every=1", f"sweep.prune={prune}", "run_dir=s"]
    Path("mine/few").mkdir(parents=True)
    for number, (seed, lr) in enumerate([(1, 1e-3), (2, 1e-3), (3, 2e-3), (4, 2e-3), (77, 1.0), (5, 1e-3)]):
        text = f"# @package _global_\nseed: {seed}\noptim: {{lr: {lr}}}\n"
        Path(f"mine/few/m{number}.yaml").write_text(text)
    assert cli.main(["train", "-m", "--config-dir", "mine", f"+{words[0]}", *words[1:]]) == 0
    reason = json.loads(Path("s/004/summary.json").read_text())["exit_reason"]
    assert reason.startswith(f"pruned by {prune} at step ") and reason in capsys.readouterr().out
    assert cli.main(["train", "-m", "--resume", "s"]) == 0
    assert started("s") == [f"{n:03d}" for n in range(6)]


def choose(folder: str, sampler: str, trials: int, stop_after: int | None = None) -> list[float]:
    """Learning rates that a sweep of ``trials`` runs draws, where each run ends at once with the stand-in's loss."""
    words = ["optim.lr=tag(log,interval(1e-5,1))", f"sweep.sampler={sampler}", f"sweep.trials={trials}"]
    sweep, _ = plan_sweep(words, [])
    sweep.folder = Path(folder)
    if (sweep.folder / "sweep.yaml").exists():
        sweep.runs = yaml.safe_load((sweep.folder / "sweep.yaml").read_text())["runs"]
    chooser = Chooser(sweep)
    for number, trial in enumerate(chooser.trials(Event())):
        if number == stop_after:
            break
        lr = float(trial.words[0].removeprefix("optim.lr="))
        run = sweep.folder / trial.name
        run.mkdir()
        loss = 3 + (math.log10(lr) + 3) ** 2
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": loss}) + "\n")
        (run / "summary.json").write_text('{"exit_reason": "finished"}')
        chooser.tell(trial, "finished", loss)
    return [axes(sweep.space)[0].drawn(words) for words in sweep.runs.values()]  # type: ignore[misc]


def test_tpe_learns_from_the_runs_before_and_chance_does_not() -> None:
    """Distance to the best learning rate, in decades, over the last 15 of 40 runs: of uniform draws from five decades
    it is 1.3 in the mean."""
    pytest.importorskip("optuna")
    far = {
        sampler: sum(abs(math.log10(lr) + 3) for lr in choose(sampler, sampler, 40)[-15:]) / 15
        for sampler in ("random", "tpe")
    }
    assert far["tpe"] < 0.8 < 1.0 < far["random"] < 1.8


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_that_was_stopped_draws_what_it_would_have_drawn(sampler: str) -> None:
    """Seven runs, then a kill while the eighth is at work, then the rest: the same as in one go."""
    pytest.importorskip("optuna")
    whole = choose("whole", sampler, 14)
    choose("parts", sampler, 14, stop_after=7)
    assert choose("parts", sampler, 14) == whole
    assert len(set(whole)) == 14


def test_what_is_drawn_comes_back_from_the_words() -> None:
    pytest.importorskip("optuna")
    words = ["optim.lr=interval(1e-4,1e-2)", "train.steps=int(interval(1,9))", "model=glob(tiny*)", "seed=range(2,8,2)"]
    lr, steps, model, seed = axes(space_of(words, []))
    for axis, drawn in ((lr, 0.00123456789), (steps, 7), (model, "tiny-qwen2"), (seed, 2)):
        assert axis.drawn(["data=demo", axis.word(drawn)]) == drawn
    assert seed.word(2) == "seed=6" and steps.word(7) == "train.steps=7" and model.word("tiny") == "model=tiny"


BAD = [
    ("optim.lr=interval(1e-4,1e-2)", "optim.lr is swept over an interval, which sweep.sampler=grid has no end of"),
    ("seed=1,2 sweep.sampler=tpe sweep.trials=0", "sweep.trials takes int >= 1 or null; got 0"),
    ("seed=1,2 sweep.sampler=bayes", 'sweep.sampler takes one of grid, random, tpe; got "bayes"'),
    ("seed=1,2 sweep.trials=4", "sweep.trials is for sweep.sampler=random or tpe"),
    ("seed=1,2 sweep.jobs=2", "sweep.jobs=2: launcher basic runs one after the other"),
    ("optim.lrr=1,2", "optim.lrr is not a setting; did you mean optim.lr?"),
    ("sweep.sampler=tpe seed=3", "sweep.sampler=tpe needs a key to vary"),
    ("sweep.sampler=tpe optim.lr=tag(log,interval(0,1))", "a logarithmic interval starts above 0"),
    ("sweep.sampler=tpe optim.lr=interval(1,-1)", "the interval starts at 1.0 and ends at -1.0"),
    ("sweep.sampler=random optim.lr=interval(-1,1)", "optim.lr takes float > 0; got -1"),
    ("seed=1,2 seed=3,4", "seed is swept twice"),
    (
        "seed=1,2 seed=3",
        "'seed=3' comes after seed is swept, and takes its place in every run; take one of the two out",
    ),
    ("sweep.jobs=1,2", "settings of the sweep itself cannot be swept"),
    ("seed=1,2 sweep.prune=median", "sweep.prune=median needs val_loss during a run: set train.eval_every"),
    ("seed=1,2 sweep.launcher=slurm", "sinfo was not found on this machine"),
    ("model=glob(huge*)", "'model=glob(huge*)' matches no preset"),
    ("seed=1,2,1", "'seed=1,2,1' has 1 twice; the same run would be made again"),
    ("seed=range(3,3)", "'seed=range(3,3)' matches no value"),
    ("seed=1, optim.lr=1e-3", "cannot read 'seed=1,': mismatched input '<EOF>'; put values"),
    ("run_dir=a,b", "'run_dir=a,b': run_dir is the folder of the whole sweep; give one"),
    ("seed=1,2 hydra/launcher=submitit_slurm", "hydra/launcher is not used here; sweep.sampler and sweep.launcher"),
    ("seed=1,2 sweep.metric=", 'sweep.metric takes text; got ""'),
    (
        "seed=1,2 sweep.prune=median sweep.metric=loss train.steps=8 sweep.prune_after=8",
        "sweep.prune_after=8 is no less than train.steps=8: no run would ever be stopped",
    ),
]


@pytest.mark.parametrize(("words", "says"), BAD)
def test_a_sweep_that_cannot_run_is_one_line(
    words: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    for package in ("optuna", "submitit"):
        pytest.importorskip(package)
    assert cli.main(["train", "-m", *words.split(), "run_dir=s"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not Path("s").exists()


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moetrain.sweep.plan.find_spec", lambda name: None)
    for words, package in (("sweep.sampler=tpe", "optuna"), ("sweep.launcher=joblib", "joblib")):
        assert cli.main(["train", "-m", "seed=1,2", words, "run_dir=s"]) == 2
        err = capsys.readouterr().err
        assert f"needs {package}, which is not installed here" in err
        assert "pip install 'moetrain[sweep]'" in err


def test_a_metric_that_no_run_writes_ends_the_sweep_and_can_be_corrected(
    capsys: pytest.CaptureFixture[str], started: Started
) -> None:
    pytest.importorskip("optuna")
    words = ["seed=int(interval(1,9))", "train.steps=2", "sweep.sampler=random", "sweep.trials=2"]
    assert cli.main(["train", "-m", *words, "sweep.metric=val_los", "run_dir=s"]) == 2
    err = capsys.readouterr().err
    assert "run 000 has finished and wrote no such number; did you mean 'val_loss'?" in err
    assert cli.main(["train", "-m", "--resume", "s", "sweep.metric=val_loss"]) == 0
    assert started("s") == ["000", "001"]


def test_settings_that_are_a_sweep_need_m(capsys: pytest.CaptureFixture[str], started: Started) -> None:
    """A preset may name the keys that are swept; words on the command line win over it."""
    Path("mine/experiment").mkdir(parents=True)
    text = "# @package _global_\nsweep:\n  params: {seed: '1,2,3', optim.lr: '1e-3,1e-2'}\ntrain: {steps: 2}\n"
    Path("mine/experiment/two.yaml").write_text(text)
    words = ["--config-dir", "mine", "experiment=two", "run_dir=s"]
    assert cli.main(["train", *words]) == 2
    assert "these settings are a sweep, over seed, optim.lr; add -m to run it" in capsys.readouterr().err
    assert cli.main(["train", "-m", *words, "seed=4"]) == 0
    runs = yaml.safe_load(Path("s/sweep.yaml").read_text())["runs"]
    assert [words[-1] for words in runs.values()] == ["optim.lr=0.001", "optim.lr=0.01"]
    assert started("s") == ["000", "001"]
