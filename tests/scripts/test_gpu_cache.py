"""Kernels that are compiled without a GPU are found again: in another process, in a folder that has been moved."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
AGAIN = """
import sys
from pathlib import Path
import gpu_cache
gpu_cache.use(Path(sys.argv[1]))
from triton import knobs
found = []
knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
failed = gpu_cache.compile_only()
gpu_cache.layers(tiny=True)
assert not failed, failed
print(len(found), sum(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_was_compiled_here_is_found_elsewhere(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=SCRIPTS, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        return done.stdout

    compiled = int(run("gpu_cache.py", str(tmp_path / "made"), "--tiny").split()[0])
    shutil.move(tmp_path / "made", tmp_path / "carried")
    asked, found = map(int, run("-c", AGAIN, str(tmp_path / "carried")).split())
    assert compiled > 10 and asked == found >= compiled
    assert {file.suffix for file in (tmp_path / "carried").glob("*/*")} == {".json", ".cubin"}
