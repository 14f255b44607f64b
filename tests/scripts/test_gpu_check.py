"""The script for GPUs, on the CPU with a tiny shape and model: all of its parts run, and say what they are for.

GPUs are rare here; this keeps it from breaking unseen.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from gpu_train import by_kernel, by_part, missing  # noqa: E402

PARTS = {"attention", "router", "experts", "dispatch", "loss", "clipping", "optimizer", "rest"}


def run(root: Path, *arguments: str) -> str:
    command = [sys.executable, str(root / "scripts" / "gpu_check.py"), "--device", "cpu", "--tiny", *arguments]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_all_parts_on_the_cpu(tmp_path: Path) -> None:
    run(ROOT, "--json", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    passed = {row["check"] for row in result["checks"] if row["ok"]}
    assert {"layer, cpu", "layer, grouped_mm", "attention latent, sdpa"} <= passed
    assert [row["backend"] for row in result["attention"]] == ["sdpa"]

    timed = {(row["backend"], row["pass"]): row["seconds"] for row in result["shapes"]}
    assert {(b, p) for b in ("cpu", "grouped_mm") for p in ("forward", "backward")} <= timed.keys()
    assert all(seconds > 0 for seconds in timed.values())

    rounded = [row for row in result["rounding"] if row["rows"] == "rounded"]
    assert rounded and all(row["count"] % 16 == 0 for row in rounded)

    *trained, parts = result["train"]
    assert {"auto", "cpu", "grouped_mm"} <= {row["backend"] for row in trained}
    # the loss of an untrained model on random tokens of 300: log(300), whatever the backend
    assert all(loss == pytest.approx(math.log(300), abs=0.1) for row in trained for loss in row["losses"])
    assert parts["parts"].keys() == PARTS


def test_backward_counts_for_the_part_whose_forward_it_is() -> None:
    """One product in the first part, three equal ones in the second: three times as many operations, both ways."""
    w = [torch.randn(4, 4, requires_grad=True) for _ in range(4)]
    x = torch.randn(3, 4, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.profiler.record_function("part:one"):
            y = x @ w[0]
        with torch.profiler.record_function("part:three"):
            y = y @ w[1] @ w[2] @ w[3]
        y.sum().backward()
    events = list(profile.events())
    parts = by_part(events, lambda event: event.count)
    count = {name: round(1e3 * n) - 1 for name, n in parts.items()}  # without the range itself
    assert count["three"] == 3 * count["one"] and count["one"] > 2  # forward: aten::matmul, aten::mm


def test_kernels_are_added_up_by_name() -> None:
    """What ran on the CPU, and ranges as the GPU saw them, are none."""
    ran = [("b", 2, "CUDA", False), ("a", 4, "CUDA", False), ("b", 5, "CUDA", False), ("c", 9, "CPU", False)]
    events = [
        SimpleNamespace(name=name, device_type=getattr(torch.autograd.DeviceType, device), is_user_annotation=annotated,
                        time_range=SimpleNamespace(elapsed_us=lambda took=took: 1e3 * took))
        for name, took, device, annotated in [*ran, ("part:experts", 11, "CUDA", True)]
    ]  # fmt: skip
    assert by_kernel(events) == [("b", 7, 2), ("a", 4, 1)]


def test_kernels_alone(tmp_path: Path) -> None:
    """Without moetrain beside it the script times kernels, and says why it does not train."""
    for folder in ("kernels", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert "no attention, no training: there is no moetrain/" in run(tmp_path, "--only", "train")


@pytest.mark.parametrize(
    ("option", "value", "complaint"), [("--json", "none/a", "no folder"), ("--minutes", "0", "more")]
)
def test_options_are_refused_before_the_minutes_are_spent(
    option: str, value: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import gpu_check

    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", option, value])
    monkeypatch.setattr(gpu_check, "Parts", None)
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_wheels_bring_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an index; behind what is installed."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert missing(tmp_path) == f"there are no wheels in {tmp_path}"
    about = "brought-1.dist-info"
    with zipfile.ZipFile(tmp_path / "brought-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_by_a_wheel.py", "here = True")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    assert missing(tmp_path) is None
    assert importlib.import_module("brought_by_a_wheel").here
    assert sys.path[-1] == str(Path(sys.modules["brought_by_a_wheel"].__file__ or "").parent)
    (tmp_path / "brought-2-py3-none-any.whl").write_text("no archive")
    assert "cannot be installed" in (missing(tmp_path) or "")


def test_persistent_programs_go_on_to_another_block() -> None:
    """In the checks, in every product and whatever tuning takes: on a chip of 132 multiprocessors."""
    pytest.importorskip("triton", reason="triton is not installed")
    from gpu_check import CHECKED
    from moe_kernels.gpu import products

    _, T, D, F, E, K = CHECKED
    tiles = T * K // 128  # full ones: the fewest that there may be
    sizes = {"up_projection": [(tiles, F)], "down_gradient": [(tiles, F)], "rows_times_weights": [(tiles, D)]}
    sizes["weight_gradient"] = [(E * 2 * F // 128, D), (E * D // 128, F)]
    for name, each in sizes.items():
        for config in getattr(products, name).configs:
            for rows, width in each:
                blocks = rows * -(-width // config.kwargs["COLS"])
                assert blocks > 132 * config.kwargs["PER_SM"], f"{name}, {config}"
