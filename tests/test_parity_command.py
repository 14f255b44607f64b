"""``moetrain parity`` as a user runs it."""

from __future__ import annotations

import json

import pytest

from moetrain.cli import main


def parity(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], str]:
    """(exit code, lines of stdout, stderr)."""
    code = main(["parity", *words])
    out, err = capfd.readouterr()
    return code, out.splitlines(), err


@pytest.mark.parametrize(
    "words",
    [
        ["world=8", "model=deepseek-v3", "parallel.pp=2", "parallel.tp=2", "parallel.ep=4", "train.global_batch=16"],
        ["world=4", "model=gpt-oss-20b", "balance=[aux_loss]", "balance.aux_loss.scope=micro_batch", "parallel.cp=2",
         "parallel.ep=4", "dispatch=two_step", "dispatch.node_size=2", "train.micro_batch=2"],
        ["world=2", "parallel.engine=deepspeed", "parallel.zero=2", "parallel.ep=2"],
    ],
    ids=["DeepSeek-V3 with pp, tp, ep", "GPT-OSS with cp, ep in two steps", "ZeRO 2"],
)  # fmt: skip
def test_a_mapping_is_proved(capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """Both curves, a line a step, then one line of JSON."""
    code, lines, err = parity(capfd, *words, "steps=4")
    assert code == 0, err
    result = json.loads(lines[-1])
    assert result["within"] and result["loads_equal"] and result["steps"] == 4
    assert max(result["loss_rel"], result["grad_norm_rel"]) <= result["tolerance"]
    rows = [line.split() for line in lines[-5:-1]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row[1]) == pytest.approx(float(row[2]), rel=1e-5) for row in rows)


def test_a_mapping_that_changes_the_loss_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    """Dropping by capacity is per rank, so two ranks drop other tokens than one process does."""
    code, lines, _ = parity(capfd, "world=2", "steps=3", "model=tiny", "model.moe.capacity_factor=1.0", "parallel.ep=2")
    result = json.loads(lines[-1])
    assert code == 1 and not result["within"] and result["loss_rel"] > 1e-6
    assert "capacity_factor drops rows rank by rank" in lines[1]


def test_fp8_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    """Rows that share a scale follow the mapping; all else is proved in float64."""
    code, lines, err = parity(capfd, "world=2", "steps=2", "model=tiny", "experts.fp8=true", "parallel.ep=2")
    assert code == 0 and json.loads(lines[-1])["tolerance"] == 1e-9, err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["world=0"], "world takes a whole number of 1 or more; got '0'"),
        (["world=2", "steps=ten"], "steps takes a whole number"),
        (["world=3", "parallel.tp=2"], "must divide the world size 3"),
        (["world=16", "parallel.ep=16"], "more ranks than model.moe.num_experts=8"),
        (["world=8", "parallel.pp=8", "parallel.layout=[1,1,1,1,1,1,1,1]"], "some stage would have no layer"),
        (["world=4", "parallel.cp=4", "train.seq_len=100"], "train.seq_len=100 must be a multiple of"),
        (["world=2", "parallel.tpp=2"], "parallel.tpp"),
        (["world=2", "parallel.engine=deepspeed", "parallel.tp=2"], "has no tensor parallelism"),
        (["world=2", "parallel.engine=deepspeed", "train.precision=float64"], "train.precision=float64"),
        (["world=2", "model=nothing"], "nothing"),
        (["wrold=2"], "wrold"),
    ],
)
def test_what_cannot_be_proved_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    code, _, err = parity(capfd, *words)
    assert code == 2 and says in err and len(err.splitlines()) == 1, err
