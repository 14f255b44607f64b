"""DeepSpeed with its state in files: the same losses as without, also of a run that goes on from a checkpoint.

Needs libaio with its headers, and compiles DeepSpeed's file access at the first use, for minutes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from moetrain_launch.fork import run_ranks

from moetrain.config.errors import ConfigError
from moetrain.train import parity
from moetrain.train.deepspeed_nvme import _build_folder, get_file_access_ready
from moetrain.train.parity import Curve
from tests.distributed.test_resume_elsewhere import resume, save_half_way
from tests.distributed.toy_run import SIGMOID, SOFTMAX, alone, check_float32, curve_of, load

MODEL = ["model.n_layers=2", "model.moe.expert_dim=1536"]  # DeepSpeed keeps what has less than 1 MiB in memory
ZERO3 = ["parallel.engine=deepspeed", "parallel.zero=3", "parallel.ep=2", "train.micro_batch=2", *MODEL]


@pytest.fixture(scope="module")
def file_access(tmp_path_factory: pytest.TempPathFactory) -> None:
    """DeepSpeed's file access, compiled; a lock that a killed job left there does not make anyone wait."""
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio with its headers is not installed (Debian: libaio-dev)")
    (_build_folder("async_io") / "lock").touch()
    get_file_access_ready(str(tmp_path_factory.mktemp("nvme")))


def test_the_same_loss(prepared: Path, tmp_path: Path, file_access: None) -> None:
    """Optimizer state in files, float32: the float64 run of one process, within 1e-5 over 20 steps."""
    common = [*SOFTMAX, *MODEL]
    files = ["parallel.offload=optimizer", f"parallel.nvme={tmp_path}"]
    one = alone(prepared, (*common, "train.precision=float64"))
    check_float32(run_ranks(2, parity.curve, load(prepared, [*SOFTMAX, *ZERO3, *files]), timeout=120), one)
    assert written(tmp_path)


def test_parameters_too_and_resumed(prepared: Path, tmp_path: Path, file_access: None) -> None:
    """Parameters and optimizer state in files, bfloat16: the losses of the same run in memory, before and after a
    checkpoint."""
    common = [*SIGMOID, *ZERO3, "train.precision=bf16", "parallel.offload=all"]
    want = curve_of(run_ranks(2, save_half_way, load(prepared, common))[0])
    shutil.rmtree(prepared / "run")
    cfg = load(prepared, [*common, f"parallel.nvme={tmp_path}"])
    got = curve_of(run_ranks(2, save_half_way, cfg, timeout=120)[0])
    resumed = curve_of(run_ranks(2, resume, cfg, timeout=120)[0])
    assert written(tmp_path)
    shutil.rmtree(prepared / "run")
    assert losses(got) == pytest.approx(losses(want), rel=1e-3)
    assert losses(resumed) == pytest.approx(losses(want), rel=1e-3)


def written(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def losses(curve: Curve) -> list[float]:
    return [row["loss"] for row in curve.rows]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"parallel\.nvme=.*/file/x cannot be made: not a directory"):
        get_file_access_ready(str(tmp_path / "file" / "x"))
