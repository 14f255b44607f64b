"""Sweeps of proxies: what is written for them, and what is read from the run directories that they leave."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from moetrain.cli import main
from moetrain.config import load, save
from moetrain.config.presets import expand_sweep
from moetrain.data.manifest import DomainInfo, Manifest, SplitInfo
from moetrain.mixture.collect import collect
from moetrain.mixture.runs import read_runs
from moetrain.mixture.shares import domain_shares, preset, setting_names
from moetrain.mixture.trained import TrainedProxies

X = np.array([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])


def leave_run(
    run: Path, words: list[str], losses: dict[str, float], reason: str = "finished", tokens: int = 1000
) -> None:
    """What ``moetrain train`` leaves, as docs/run-directory.md says."""
    run.mkdir(parents=True)
    save(load(["data=own", f"data.dir={run.parent}/data", *words]), run / "config.yaml")
    (run / "summary.json").write_text(
        json.dumps({"exit_reason": reason, "val_loss_by_domain": losses, "tokens": tokens})
    )


def leave_data(folder: Path, tokens: dict[str, int]) -> None:
    """The manifest of a prepared data set."""
    folder.mkdir(parents=True)
    split = {name: SplitInfo(1, count, count, {}) for name, count in tokens.items()}
    domains = {name: DomainInfo("", one, one) for name, one in split.items()}
    Manifest("own", "", "", 10, "", 0, "", domains).save(folder)


def weigh(weights: dict[str, float]) -> list[str]:
    return [f"data.sources.{name}.weight={weight}" for name, weight in weights.items()]


def losses_of(weights: dict[str, float]) -> dict[str, float]:
    return {name: 5 - weight for name, weight in weights.items()}


def test_a_sweep_of_ones_own_becomes_files_for_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are normalised; a domain that no run trains on is a target only; what did not finish is left out. The
    third run asks by rule: shares by the square root of the tokens; and it is shorter, which is said."""
    leave_data(tmp_path / "data", {"web": 900, "code": 100, "exam": 50})
    rows = [{"web": 2.0, "code": 6.0, "exam": 0.0}, {"web": 1.0, "code": 0.0, "exam": 0.0}]
    for number, weights in enumerate(rows):
        leave_run(tmp_path / f"{number:03d}", weigh(weights), losses_of(weights))
    rule = ["data.mixture=temperature", *weigh({"exam": 0}), *(f"data.sources.{n}.paths=[x]" for n in ("web", "code"))]
    leave_run(tmp_path / "002", rule, {"web": 1.0, "code": 2.0, "exam": 3.0}, tokens=999)
    leave_run(tmp_path / "003", weigh(rows[0]), {}, reason="loss is nan")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"runs": {f"{n:03d}": [] for n in range(5)}}))
    warned: list[str] = []
    monkeypatch.setattr("moetrain.mixture.collect.logger.warning", lambda text, *values: warned.append(text % values))
    assert main(["mixture", f"collect={tmp_path}"]) == 0
    assert "3 runs of 2 domains" in capsys.readouterr().out
    assert warned[0] == f"{tmp_path}: left out, not finished: 003, 004"
    assert warned[1].startswith(f"{tmp_path}: trained on other numbers of tokens than 000 (1000): 002;")
    runs = read_runs(str(tmp_path), "train")
    assert (runs.domains, runs.targets) == (["web", "code"], ["web", "code", "exam"])
    np.testing.assert_allclose(runs.weights, [[0.25, 0.75], [1, 0], [0.75, 0.25]])
    np.testing.assert_allclose(runs.losses, [[3, -1, 5], [4, 5, 5], [1, 2, 3]])
    assert (tmp_path / "train_mixture.csv").read_text().splitlines()[0] == "index,train_web,train_code"
    assert (tmp_path / "train_loss.csv").read_text().startswith("index,metric/web_val_loss,")


@pytest.mark.parametrize(
    ("words", "warns"),
    [([], False), (["data.max_epochs=2"], True), (["data.max_epochs=2", "data.exhausted=repeat"], False)],
)
def test_a_run_that_ran_out_of_a_domain_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: list[str], warns: bool
) -> None:
    """Of 1,000 tokens one run wants 200 of the 100 there are, which a cap of two passes allows; the other 300."""
    leave_data(tmp_path / "data", {"web": 9000, "code": 100})
    for number, share in enumerate((0.2, 0.3)):
        weights = {"web": 1 - share, "code": share}
        leave_run(tmp_path / f"{number:03d}", [*weigh(weights), *words], losses_of(weights))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"runs": {"000": [], "001": []}}))
    assert len(collect(tmp_path).weights) == 2
    assert (f"{tmp_path}/001 ran out of code" in caplog.text) == ("ran out" in caplog.text) == warns
    assert f"{tmp_path}/000" not in caplog.text


def test_proxies_are_a_sweep_over_presets_and_finished_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the subprocess trains all mixtures but the last, then is called again for the rest."""
    commands: list[list[str]] = []
    names = ["plays", "code"]

    def job(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        sweep = tmp_path / "round-1"
        if "--resume" in command:
            leave_run(sweep / "002", weigh(dict(zip(names, X[2], strict=True))), {"plays": 4.5, "code": 4.5})
            return subprocess.CompletedProcess(command, 0)
        dirs = [command[at + 1] for at, word in enumerate(command) if word == "--config-dir"]
        words = [word for word in command[5:] if "=" in word]
        jobs = list(expand_sweep(words, dirs))
        assert len(jobs) == 3
        leave_data(sweep / "data", {"plays": 10, "code": 10})
        (sweep / "sweep.yaml").write_text("")
        for number, words in enumerate(jobs):
            cfg = load(words, config_dirs=dirs, kinds=False)
            assert (cfg.train.steps, cfg.checkpoint.at_end) == (7, False)
            weights = {name: float(cfg.data.sources[name].weight or 0) for name in names}
            assert list(weights.values()) == pytest.approx(list(X[number]))
            if number < 2:
                leave_run(sweep / f"{number:03d}", weigh(weights), losses_of(weights))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", job)
    keys = {name: f"data.sources.{name}" for name in names}
    proxies = TrainedProxies(tmp_path, keys, names, ["data=demo", "train.steps=7"], [])
    found = proxies.run(X, 1)
    np.testing.assert_allclose(found[:2], 5 - X[:2])
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(proxies.run(X, 1), 5 - X)
    proxies.run(X, 1)
    assert len(commands) == 2
    with pytest.raises(Exception, match="trained on another mixture"):
        proxies.run(X[::-1], 1)
    (tmp_path / "round-1" / "002" / "summary.json").unlink()
    (tmp_path / "round-2").mkdir()
    assert np.isnan(proxies.run(X, 1)[2]).all(), "round 2 was drawn without it, so it stays out"
    assert len(commands) == 2


def test_mixtures_of_domains_with_several_sources(tmp_path: Path) -> None:
    """A domain of two sources, one whose only source has another name, one that is its source: what sets each weight,
    and that a config with these settings asks for just that mixture, the sources of a domain as before."""
    leave_data(tmp_path / "data", {"a": 100, "b": 300, "c": 200, "d": 400})
    words = ["data=own", f"data.dir={tmp_path}/data", "data.mixture=uniform"]
    words += [f"data.sources.{name}.paths=[x]" for name in "abcd"]
    words += ["data.sources.a.domain=web", "data.sources.b.domain=web", "data.sources.c.domain=talk"]
    cfg, manifest = load(words), Manifest.load(tmp_path / "data")
    assert domain_shares(cfg, manifest) == pytest.approx({"web": 1 / 3, "talk": 1 / 3, "d": 1 / 3})
    names = setting_names(cfg.data, ["web", "talk", "d"])
    assert names == {"web": "data.domains.web", "talk": "data.sources.c", "d": "data.sources.d"}
    wanted = {"web": 0.6, "talk": 0.0, "d": 0.4}
    tree = preset(names, wanted)["data"]
    words += [f"data.mixture={tree['mixture']}"]
    words += [
        f"data.{group}.{n}.weight={v['weight']}" for group in ("sources", "domains") for n, v in tree[group].items()
    ]
    assert domain_shares(load(words), manifest) == pytest.approx(wanted)


WRONG = [
    (["collect=nowhere"], "not a sweep of 'moetrain train -m'"),
    (["search=s"], "give runs=N"),
    (["search=s", "runs=9"], "the first round needs 10"),
    (["search=s", "runs=ten"], "runs takes a number"),
    (["search=s", "runs=10", "predicter=law"], "did you mean 'predictor'"),
    (["search=s", "runs=10", "train.stepz=3"], "stepz"),
    (["search=s", "runs=10", "data=dem"], "did you mean 'demo'"),
    (["search=s", "runs=10", "run_dir=x"], "has its own folders"),
    (["search=s", "runs=10", "mixer=dga", "mixer.target=[code]"], "runs of a mixture need mixer=none"),
    (["search=s", "runs=10", "start=5"], "for proxy=merged"),
    (["search=s", "runs=10", "proxy=merge"], "proxy=merge is not known; did you mean 'merged'"),
    (["search=s", "runs=10", "proxy=merged", "models=nowhere"], "there is no such folder"),
    (["search=s", "fit=s"], "search and fit do not go together"),
    (["search=s", "runs=10", "rows=10"], "rows= does not go with search="),
    (["cluster=c", "clusters=1"], "clusters= takes a whole number of 2 or more"),
    (["cluster=c", "embed=nowhere"], "there is no such folder"),
    ([], "give one of search, fit, cluster, collect"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_words_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    """Nothing is written either."""
    monkeypatch.chdir(tmp_path)
    assert main(["mixture", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
