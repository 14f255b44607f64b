"""The command line: one line and an exit code for what is wrong, help on every setting, ranks that start and end well.

Training itself is tested in test_end_to_end.py; here ``moetrain.train.run`` is never reached, or is stood in for.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain import cli
from moetrain.config import Config, load, save
from moetrain.config.check import check_mapping
from moetrain.config.typed import paths_of
from moetrain.start import pick_run_dir

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "launch"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    yield


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("trian", 2, "there is no command 'trian'; did you mean 'train'?"),
        ("train train.stepz=3", 2, "train.stepz is not a setting; did you mean train.steps?"),
        ("train --resum x", 2, "unrecognized arguments: --resum"),
        ("train parallel.ep=3", 2, "ep 3 x etp 1 = 3 must divide the world size 1"),
        ("train launch.ranks=3", 2, "train.global_batch=8 must be a multiple of train.micro_batch=4 x 3"),
        ("train launch.nodes=2", 2, "launch.nodes=2: 'moetrain train' starts ranks on this machine alone"),
        ("train -m launch.nodes=2 seed=1,2", 2, "launch.nodes=2: 'moetrain train' starts ranks on this machine alone"),
        ("train launch.nodes=2 parallel.ep=4 dry_run=true", 2, "ep 4 x etp 1 = 4 must divide the world size 2"),
        ("train --resume nowhere", 2, "--resume nowhere: there is no such folder"),
        ("train --resume .", 2, "--resume .: not a run directory, it has no config.yaml"),
        ("train --config nothing.yaml", 2, "nothing.yaml cannot be read"),
        ("train --config-dir nowhere", 2, "is not a folder"),
        ("train -m --resume . seed=1,2", 2, "-m --resume .: not a sweep, it has no sweep.yaml that can be read"),
        ("train -m seed=1,2 train.steps=0,1", 2, "train.steps takes int >= 1; got 0"),
        ("train --help trian", 2, "'trian' is not a setting or a group"),
        ("mapping world=6 parallel.tp=4", 2, "tp 4 = 4 must divide the world size 6"),
        ("mapping world=0", 2, "world takes a whole number of 1 or more; got '0'"),
        ("mapping wrld=4", 2, "wrld is not a setting"),
        ("prepare data=nothing", 2, "no preset of data is called 'nothing'"),
        ("prepare --resume .", 2, "unrecognized arguments: --resume"),
    ],
)
def test_wrong_words_give_one_line_and_an_exit_code(
    words: str, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == code
    out, err = capsys.readouterr()
    assert says in err and err.startswith("moetrain: error: ") and err.count("\n") == 1
    assert not out and not list(Path(".").iterdir())


def test_traceback_on_request() -> None:
    with pytest.raises(Exception, match="is not a setting"):
        cli.main(["train", "--traceback", "train.stepz=3"])


def test_a_taken_run_directory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name, word in (("taken", "taken"), ("all taken", "'all taken'")):  # as a shell takes it
        (Path(name) / "checkpoints/step-1").mkdir(parents=True)
        assert cli.main(["train", f"run_dir={name}"]) == 2
        assert f"{name} already holds a run; continue it with --resume {word}, or" in capsys.readouterr().err


def test_a_default_run_directory_is_numbered_on_and_an_asked_one_is_kept() -> None:
    cfg = load(["run_dir=runs/x"])
    for name in ("x", "x-2"):
        assert pick_run_dir(cfg, asked=False) == Path("runs") / name
        (Path("runs") / name).mkdir(parents=True)
        save(cfg, Path("runs") / name / "config.yaml")
    assert pick_run_dir(cfg, asked=False) == Path("runs/x-3")
    assert pick_run_dir(cfg, asked=True) == Path("runs/x")
    save(load(["run_dir=runs/x-2"]), Path("runs/x-2/config.yaml"))
    Path("runs/x-2/stopped").touch()  # by a signal: the same command goes on
    assert pick_run_dir(cfg, asked=False) == Path("runs/x-2")
    assert pick_run_dir(load(["run_dir=runs/x", "seed=7"]), asked=False) == Path("runs/x-3")


def test_help_shows_every_setting_with_type_default_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {words[0]: " ".join(words[1:]) for words in lines if words}
    seams = ("model.router", "optim", "dispatch", "experts.placement")
    kinds = {name: f"{name}.kind" for name in seams}
    groups = {path.rpartition(".")[0] for path in paths_of(Config)}
    for path in set(paths_of(Config)) - groups - {"balance", "data.sources", "data.domains"}:
        assert kinds.get(path, path) in shown, f"{path} is missing"
    assert shown["train.steps"] == "int >= 1 = 100 optimizer steps"
    for path in ("data.sources.NAME.weight", "balance.aux_loss.coef", "optim.lr", "model.router.score"):
        assert shown[path]
    assert "mixtral-8x7b" in shown["model"]


def test_help_on_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "checkpoint"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("  ")} == {
        f"checkpoint.{name}" for name in ("every", "keep", "asynchronous", "at_end")
    }


def test_mapping_shows_both_grids_at_once_and_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    """A world of 4,096 ranks is shortened for readers and whole in JSON; torch alone would take over a second."""
    words = ["mapping", "world=4096", "node=8", "model=deepseek-v3", "parallel.pp=16", "parallel.ep=64",
             "parallel.schedule=dualpipev", "parallel.tp=4"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    code = (
        "import sys\nfrom moetrain import cli\ncode = cli.main(sys.argv[1:])\nsys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) < 80
    assert "15, 16" in done.stdout and "(0 1 2 3) (4 5 6 7)" in done.stdout and "over 8 nodes" in done.stdout
    assert "would refuse this mapping for model deepseek-v3: train.global_batch=8 must be" in done.stdout
    assert cli.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["groups"]["ep"]["ranks"][1] == list(range(64, 128)) and shown["groups"]["tp"]["nodes"] == 1
    assert shown["ranks"][-1] == {"rank": 4095, "pp": 15, "dp_replicate": 0, "dp_shard": 63, "cp": 0, "tp": 3,
                                  "edp": 3, "ep": 63, "etp": 0}  # fmt: skip
    assert shown["stages_of_pp_rank"][15] == [15, 16] and "global_batch" in shown["refused"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("device=cuda", "device=cuda, but torch sees no CUDA device"),
        ("experts.backend=triton", "expert backend 'triton' cannot run: the Triton kernels need a GPU"),
        ("model.attention.backend=flash", "model.attention.backend=flash cannot run: it needs CUDA"),
    ],
)
def test_what_cannot_run_here_is_refused_before_any_work(
    word: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No text is prepared, and no folder made."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["train", "experiment=demo", word]) == 2
    assert says in capsys.readouterr().err and not list(Path().iterdir())


def test_resume_takes_the_saved_config_and_further_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything comes from the run directory, which may have moved; single settings may be changed."""
    seen: list[tuple[Config, bool]] = []
    monkeypatch.setattr("moetrain.train.run", lambda cfg, resume: seen.append((cfg, resume)))
    monkeypatch.setattr("moetrain.start.get_ready", lambda cfg, resume: None)
    Path("moved").mkdir()
    save(load(["run_dir=before", "seed=5", "model.n_layers=2"]), "moved/config.yaml")
    assert cli.main(["train", "--resume", "moved", "train.steps=7"]) == 0
    [(cfg, resume)] = seen
    assert resume
    assert (cfg.run_dir, cfg.seed, cfg.model.n_layers, cfg.train.steps) == ("moved", 5, 2, 7)


def test_under_a_launcher_a_rank_trains_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a launcher's environment no ranks are started, and the sizes are checked against its world."""
    seen: list[Config] = []
    monkeypatch.setattr("moetrain.train.run", lambda cfg, resume: seen.append(cfg))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "parallel.ep=4", "train.global_batch=16"]) == 0
    assert cli.main(["train", "parallel.ep=8"]) == 2
    assert len(seen) == 1


RANK = """
import os, signal, sys, time
from moetrain_launch import local
rank, what = int(os.environ["RANK"]), sys.argv[1]
local.end_with_parent()
open(f"starting-{rank}", "w").write(str(os.getpid()))
os.rename(f"starting-{rank}", f"pid-{rank}")
if what == "env":
    open(f"env-{rank}", "w").write(" ".join(os.environ[k] for k in ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")))
elif rank == 1:
    while not os.path.exists("pid-0"):
        time.sleep(0.01)
    if what == "error":
        local.record_error("loss is nan at step 3", 7)
        sys.exit(7)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        sys.exit(3)
if what != "env":
    time.sleep(60)
"""

LAUNCH = """
import json, sys
from dataclasses import asdict
from moetrain_launch import local
outcome = local.run_ranks([sys.executable, "rank.py", sys.argv[1]], 2, {"OMP_NUM_THREADS": "1"})
print(json.dumps(asdict(outcome)))
"""


def launch(what: str) -> subprocess.Popen[str]:
    Path("rank.py").write_text(RANK)
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen([sys.executable, "-c", LAUNCH, what], stdout=subprocess.PIPE, text=True, env=env)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("env", 0, ""),
        ("error", 7, "loss is nan at step 3"),
        ("exit", 3, "rank 1 failed with exit code 3"),
        ("kill", 137, "rank 1 was ended by SIGKILL"),
    ],
)
def test_ranks_end_together_with_one_message(what: str, code: int, message: str) -> None:
    """The rank that failed first is reported, whatever that did to the other one, which is stopped."""
    out, _ = launch(what).communicate(timeout=60)
    outcome = json.loads(out)
    assert outcome["code"] == code
    assert outcome["message"].startswith(message) and bool(message) == bool(outcome["message"])
    assert not any(is_running(int(Path(f"pid-{rank}").read_text())) for rank in range(2))
    if what == "env":
        assert [Path(f"env-{rank}").read_text() for rank in range(2)] == ["2 0 1", "2 1 1"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_when_their_parent_is_stopped(how: signal.Signals) -> None:
    """Also when it is killed outright: no rank goes on writing to the run directory."""
    parent = launch("sleep")
    wait_for(lambda: all(Path(f"pid-{rank}").exists() and Path(f"pid-{rank}").read_text() for rank in range(2)))
    parent.send_signal(how)
    out, _ = parent.communicate(timeout=60)
    wait_for(lambda: not any(is_running(int(Path(f"pid-{rank}").read_text())) for rank in range(2)))
    if how is not signal.SIGKILL:
        assert json.loads(out) == {"code": 128 + how, "message": f"stopped by {how.name}"}


def test_the_commands_of_the_first_run_can_be_given() -> None:
    text = (ROOT / "docs/first-run.md").read_text()
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("moetrain train ")]
    runs = [words[2:] for words in lines if words[2].startswith("experiment=")]
    assert len(runs) >= 3
    for words in runs:
        cfg = load(words)
        check_mapping(cfg, cfg.launch.ranks)
    [more] = [words[-1] for words in lines if "--resume" in words]
    assert load(["experiment=demo", more]).train.steps > load(["experiment=demo"]).train.steps


@pytest.mark.parametrize("term", ["dumb", "xterm"])
@pytest.mark.parametrize(
    "words",
    [
        "mapping world=8 parallel.tp=2 parallel.ep=4",
        "train model=tiny launch.ranks=2 parallel.pp=2 dry_run=true",
        "simulate cluster=h100 ranks=4 model=tiny steps=2",
    ],
)
def test_tables_of_numbers_are_whole_on_a_narrow_terminal(
    words: str, term: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(words.split()) == 0
    out = capsys.readouterr().out
    assert "\u2026" not in out and max(map(len, out.splitlines())) > 60
