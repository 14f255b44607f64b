"""The Triton kernels of all ops but the expert layer, in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.ops import INTERPRETED, interpreted

FILES = ("triton_ops", "loss", "norm", "op_strides", "permute", "rotary", "router")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    here = Path(__file__).parent
    files = [str(here / f"test_{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-x", "-k", "triton", "-p", "no:cacheprovider", *files]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, cwd=here.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


@interpreted
def test_the_checks_for_a_gpu_pass_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """``scripts/gpu_check.py`` runs them at full size on a GPU."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    from gpu_ops import op_checks

    for name, limit, error in op_checks("cpu", tiny=True):
        assert error() <= limit, name
