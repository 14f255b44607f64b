"""DeepEP: refused in one line where it cannot run, and driven rightly where a stand-in for the package answers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch.distributed as dist
from moetrain_launch.fork import run_ranks

from moetrain import config
from moetrain.config.errors import ConfigError
from moetrain.moe.dispatch import build_dispatcher, deep_ep
from tests.distributed import fake_deep_ep
from tests.distributed.moe_ranks import E, Spread, compare, on_rank


def _refusal() -> str:
    with pytest.raises(ConfigError) as error:
        build_dispatcher({"kind": "deep_ep"}, E, dist.group.WORLD)
    return str(error.value)


def test_refused_without_the_package_and_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep.importlib.util, "find_spec", lambda name: None)
    text = "deep_ep needs the DeepEP package (deep_ep), which is not installed; use dispatch=all_to_all"
    assert run_ranks(2, _refusal) == [text] * 2
    monkeypatch.setattr(deep_ep.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(deep_ep.torch.cuda, "is_available", lambda: False)
    assert run_ranks(2, _refusal) == ["deep_ep needs CUDA, and this machine has none; use dispatch=all_to_all"] * 2


def test_refused_with_rows_that_it_cannot_move() -> None:
    with pytest.raises(ConfigError) as error:
        config.load(["dispatch=deep_ep", "train.precision=float32"])
    assert str(error.value) == (
        "dispatch=deep_ep moves bfloat16 rows only, but train.precision=float32; "
        "use dispatch=all_to_all or train.precision=bf16"
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", fake_deep_ep)
    monkeypatch.setattr(deep_ep, "obstacle", lambda: None)


def test_refused_for_a_number_of_ranks_that_the_package_does_not_serve(fake: None) -> None:
    text = "deep_ep cannot serve parallel.ep=1: Unsupported number of EP ranks: 1; use dispatch=all_to_all"
    assert run_ranks(1, _refusal) == [text]


CASES = [
    (2, 1, "dropless", [13, 8]),
    (4, 1, "dropless", [0, 12, 0, 1]),
    (4, 1, "hot expert", [4, 0, 5, 3]),
    (4, 1, "drops", [9, 0, 16, 5]),
    (2, 2, "biases", [5, 9, 3, 8]),
]


@pytest.mark.parametrize(("ep", "etp", "case", "sizes"), CASES, ids=str)
@pytest.mark.parametrize(("recompute", "overlap"), [("none", False), ("full", True)])
def test_equals_one_process(
    fake: None, ep: int, etp: int, case: str, sizes: list[int], recompute: str, overlap: bool
) -> None:
    compare(Spread({"kind": "deep_ep"}, ep, etp, recompute, overlap), case, sizes)


def _calls(spread: Spread) -> tuple[Any, int]:
    on_rank(spread, "dropless", [6, 7])
    return fake_deep_ep.Buffer.calls, fake_deep_ep.Buffer.made


def test_counts_are_exchanged_once_and_the_handle_reused(fake: None) -> None:
    backward = ["dispatch by handle", "combine"]
    assert run_ranks(2, _calls, Spread({"kind": "deep_ep"}, 2)) == [(["dispatch", "combine", *backward], 1)] * 2
    again = ["dispatch", "combine", "dispatch by handle", "combine", *backward]
    assert run_ranks(2, _calls, Spread({"kind": "deep_ep"}, 2, recompute="full")) == [(again, 1)] * 2
