"""``moetrain plan calibrate`` and ``moetrain plan check``: a machine measured, and a run beside its prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetrain import config
from moetrain.cli import main
from moetrain.planner.calibrate import _line
from moetrain.planner.cluster import read_cluster


def test_a_start_and_a_rate_are_found_from_times() -> None:
    """500 us and 2 GB/s, over sizes from 1 KB to 16 MB; times 3% off, one up, one down."""
    sizes = [float(1 << n) for n in range(10, 25, 2)]
    start, per_byte = _line(sizes, [(500e-6 + size / 2e9) * (1 + 0.03 * (-1) ** i) for i, size in enumerate(sizes)])
    assert start == pytest.approx(500e-6, rel=0.03) and 1 / per_byte == pytest.approx(2e9, rel=0.03)


def test_a_measured_machine_is_a_cluster_that_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two ranks. What the numbers are depends on the machine; ``read_cluster`` refuses those that cannot be."""
    file = tmp_path / "here.yaml"
    assert main(["plan", "calibrate", f"out={file}", "ranks=2"]) == 0
    found = read_cluster(file)
    assert found.kind == "cpu" and found.node == 2
    assert found.ring_gb_s is not None and found.ring_us is not None and found.launch_us is not None
    assert found.tflops["bf16"] >= found.tflops["float32"]
    capsys.readouterr()
    words = ["model=tiny", f"cluster={file}", "gpus=2", "seq=128", "global_batch=8", "precision=float32"]
    assert main(["plan", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["seconds"] > 0


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of the demo on two ranks, of which six lines of metrics are there."""
    folder = tmp_path / "run"
    folder.mkdir()
    config.save(config.load(["experiment=demo", "device=cpu"]), folder / "config.yaml")
    lines = [{"step": step, "tokens_per_s": 100.0 if step < 3 else 4096.0, "memory_gib": 1.0} for step in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_beside_its_prediction(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,024 tokens a step at 4,096 tokens/s are a quarter of a second; the first two lines are warm-up."""
    assert main(["plan", "check", str(run_dir), "cluster=this-machine", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)["numbers"]
    predicted, happened = numbers["seconds a step"]
    assert happened == pytest.approx(0.25)
    assert numbers["tokens/s"] == pytest.approx([1024 / predicted, 4096.0])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("calibrate out=here.txt", "out=FILE.yaml"),
        ("calibrate out=nowhere/here.yaml", "there is no folder"),
        ("calibrate ranks=0", "ranks=N"),
        ("calibrate base=h10", "did you mean 'h100'"),
        ("calibrate faster", "got 'faster'"),
        ("check", "takes one run directory"),
        ("check RUN other cluster=h100", "takes one run directory"),
        ("check RUN", "moetrain plan calibrate"),
        ("check nowhere cluster=h100", "nowhere"),
        ("check RUN cluster=h10", "did you mean 'h100'"),
        ("check SHORT cluster=h100", "too few steps"),
        ("check TORN cluster=h100", "damaged"),
    ],
)
def test_wrong_words_are_one_line(
    words: str, says: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_dir.parent)
    metrics = run_dir / "metrics.jsonl"
    if "SHORT" in words:
        metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    if "TORN" in words:
        metrics.write_text('{"step": 1\n' + metrics.read_text())
    names = {"RUN": "run", "SHORT": "run", "TORN": "run"}
    assert main(["plan", *(names.get(word, word) for word in words.split())]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
