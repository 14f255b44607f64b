"""The backend "fastest" takes what was fastest, remembers it, tells it, and leaves no trace where it was called."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moe_kernels import expert_mlp
from moe_kernels.fastest import fastest
from moe_kernels.operands import Operands
from moe_kernels.reference import loop_expert_mlp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.train.runtime import set_up_log
from tests.kernels.expert_cases import Case, make_case
from tests.kernels.test_experts import compare


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As in a new process, whose log takes every line."""
    monkeypatch.setattr("moe_kernels.fastest._taken", {})
    monkeypatch.setattr(logging.getLogger("moe_kernels"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("moe_kernels"), "handlers", [])  # a run in this process may have left some
    caplog.set_level(logging.INFO, "moe_kernels")


def operands(case: Case) -> Operands:
    return Operands(**case.inputs, counts=case.counts, index_R=case.index_R)  # type: ignore[arg-type]


def path(calls: list[int], seconds: float) -> Callable[[Operands], Tensor]:
    """The loop, slowed down; it notes the rows of its calls."""

    def run(o: Operands) -> Tensor:
        calls.append(sum(o.row_counts))
        time.sleep(seconds)
        return loop_expert_mlp(o)

    return run


def test_it_is_measured_once_for_each_power_of_two_of_rows(caplog: pytest.LogCaptureFixture) -> None:
    slow: list[int] = []
    paths = {"slow": path(slow, 0.2), "quick": path([], 0.0)}
    assert [fastest(operands(make_case(counts)), paths) for counts in ([9, 8], [2, 30], [32, 1])] == ["quick"] * 3
    assert set(slow) == {17, 33}  # 32 rows are like 17
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "2 of width 8, up to 32 rows: slow " in lines[0] and lines[0].endswith(" ms: quick")


def test_a_backend_that_fails_is_out(caplog: pytest.LogCaptureFixture) -> None:
    def broken(o: Operands) -> Tensor:
        raise OSError("no such kernel\nmore lines")

    o = operands(make_case([5, 4]))
    assert fastest(o, {"broken": broken, "loop": loop_expert_mlp}) == "loop"
    assert "broken failed (no such kernel), loop" in caplog.text and "more lines" not in caplog.text
    with pytest.raises(RuntimeError, match="no expert backend could run: broken failed"):
        fastest(operands(make_case([50, 4])), {"broken": broken})


@pytest.mark.parametrize("counts", [[7, 0, 12], [0, 0, 0]], ids=str)
def test_results_are_the_loops(counts: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Of all that can run here; no rows are not measured."""
    case = make_case(counts, bias=True)
    compare(case.run("fastest", torch.float64), case.run("loop", torch.float64), 1e-12)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (sum(counts) > 0) and all("loop" in line and "cpu" in line for line in told)


def test_it_may_be_asked_in_the_middle_of_checkpointing() -> None:
    """Where whatever is saved for backward is dropped and counted: measuring must not be. No gradient is left behind
    by it either, and parameters may be wider than rows."""
    case = make_case([7, 12], dtype=torch.bfloat16)
    half = {name: t.bfloat16().requires_grad_() for name, t in case.inputs.items()}
    leaves = half | {name: case.inputs[name].float().requires_grad_() for name in ("w13", "w2")}

    def layer(**inputs: Tensor) -> Tensor:
        return expert_mlp(**inputs, counts=case.counts, index_R=case.index_R, backend="fastest")

    y_RD = checkpoint(layer, use_reentrant=False, **leaves)
    assert all(t.grad is None for t in leaves.values())
    y_RD.sum().backward()
    assert all(t.grad is not None for t in leaves.values())


def test_a_run_keeps_the_line_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for logger in (logging.getLogger("moe_kernels"), logging.getLogger("moetrain")):
        for name, value in (("handlers", []), ("propagate", True), ("level", logging.INFO)):
            monkeypatch.setattr(logger, name, value)
    set_up_log(tmp_path, 0)
    fastest(operands(make_case([9, 8])), {"loop": loop_expert_mlp})
    assert "INFO experts: 2 of width 8, up to 32 rows: loop" in (tmp_path / "log.txt").read_text()
