"""How functions that launch Triton's kernels are called, without triton or a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from moe_kernels.gpu.operator import operator
from torch import Tensor


@operator("test_of_the_device")
def launched_on(x: Tensor) -> int:
    return torch.cuda.current_device()


@pytest.mark.parametrize("device", [0, 1])
def test_it_launches_on_the_gpu_of_its_tensors(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one: there triton would launch, with pointers into another GPU's memory."""
    current = [0]

    @contextlib.contextmanager
    def switched(to: int) -> Iterator[None]:
        current.append(to)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switched)
    assert launched_on(SimpleNamespace(is_meta=False, is_cuda=True, get_device=lambda: device)) == device
    assert current == [0]
