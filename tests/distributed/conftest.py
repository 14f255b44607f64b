"""Fixtures of the distributed tests."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from moetrain.data.prepare import prepare
from tests.distributed.toy_run import load

# What ranks import once they run, here once for all of them, before they are forked: torch's compiler, of which
# recomputation needs a part, and what DeepSpeed loads when an engine is made.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
for module in (
    "torch._dynamo",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
):
    importlib.import_module(module)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens of two tiny domains."""
    folder = tmp_path_factory.mktemp("toy")
    prepare(load(folder, []).data)
    return folder
