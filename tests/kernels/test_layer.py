"""``moe_mlp``: a layer of routed experts is the weighted sum of its tokens' experts, and keeps what SonicMoE keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_kernels import expert_mlp, moe_mlp, permute
from torch import Tensor

from tests.kernels.layer_cases import by_definition, kept_bytes, make_layer, run
from tests.kernels.test_experts import compare


@pytest.mark.parametrize("backend", ["loop", "cpu", "grouped_mm"])
@pytest.mark.parametrize(("activation", "matrices"), [("gpt_oss", 2), ("relu2", 1)])
def test_is_its_definition(backend: str, activation: str, matrices: int) -> None:
    inputs, ids_TK = make_layer(T=19, K=3, E=6, D=16, F=8, matrices=matrices, bias=True)
    want = run(by_definition, inputs, ids_TK, torch.float64, activation=activation)
    dtype, tolerance = (torch.float32, 2e-5) if backend == "grouped_mm" else (torch.float64, 1e-12)
    compare(run(moe_mlp, inputs, ids_TK, dtype, activation=activation, backend=backend), want, tolerance)


def in_two_steps(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, **more: Any) -> Tensor:
    """``moe_mlp`` by ``expert_mlp``, for those who order rows themselves: it adds up each token's."""
    _, counts_e, row_TK = permute(x_TD.detach(), ids_TK, len(w13))
    assignment_R = row_TK.flatten().argsort()
    return expert_mlp(
        x_TD, counts_e, w13, w2, index_R=assignment_R // ids_TK.shape[1], weight_R=weights_TK.flatten()[assignment_R],
        row_TK=row_TK, **more,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["loop", "cpu", "grouped_mm"])
def test_experts_may_add_up_each_tokens_rows(backend: str) -> None:
    inputs, ids_TK = make_layer(T=19, K=3, E=6, D=16, F=8, bias=True)
    want = run(by_definition, inputs, ids_TK, torch.float64)
    dtype, tolerance = (torch.float32, 2e-5) if backend == "grouped_mm" else (torch.float64, 1e-12)
    compare(run(in_two_steps, inputs, ids_TK, dtype, backend=backend), want, tolerance)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"row_TK": torch.zeros(12, dtype=torch.int64)}, "row_TK is int64 .N, K., beside index_R, not torch.int64"),
        ({"row_TK": torch.zeros(6, 2)}, "row_TK is int64 .N, K., beside index_R, not torch.float32"),
        ({"row_TK": torch.zeros(4, 3, dtype=torch.int64)}, "row_TK has shape .4, 3. where 6 tokens have 12 rows"),
        ({"row_TK": torch.zeros(6, 1, dtype=torch.int64)}, "row_TK has shape .6, 1. where 6 tokens have 12 rows"),
        ({"index_R": None, "counts": [6, 0, 0, 0]}, "row_TK is int64 .N, K., beside index_R"),
    ],
)
def test_rows_of_tokens_that_do_not_fit(change: dict[str, Any], complaint: str) -> None:
    inputs, _ = make_layer(T=6, K=2, E=4, D=8, F=8)
    given = {"counts": [12, 0, 0, 0], "index_R": torch.arange(12) // 2, "row_TK": torch.arange(12).view(6, 2)} | change
    with pytest.raises(ValueError, match=complaint):
        expert_mlp(inputs["x_TD"], w13=inputs["w13"], w2=inputs["w2"], **given)


@pytest.mark.parametrize(("K", "F"), [(2, 64), (8, 16)], ids=["coarse", "fine"])
def test_memory_does_not_depend_on_granularity(K: int, F: int) -> None:
    """2 T D + 4 T K F bytes in bf16 (arXiv 2512.14080): the layer's input, and gate and up of each row."""
    T, D = 40, 32
    assert kept_bytes(T, K, 12, D, F, "cpu") == 2 * T * D + 4 * T * K * F


def test_counts_may_be_a_tensor() -> None:
    inputs, ids_TK = make_layer(T=12, K=1, E=4, D=8, F=8)
    x_ND, w13, w2 = inputs["x_TD"], inputs["w13"], inputs["w2"]
    counts_e = torch.bincount(ids_TK.flatten(), minlength=4)
    got = [expert_mlp(x_ND, counts, w13, w2) for counts in (counts_e, counts_e.tolist())]
    assert torch.equal(*got)
    for bad in (counts_e.float(), counts_e[None]):
        with pytest.raises(ValueError, match="counts must be integers"):
            expert_mlp(x_ND, bad, w13, w2)


def test_no_tokens() -> None:
    inputs, ids_TK = make_layer(T=0, K=2, E=4, D=8, F=8)
    got = run(moe_mlp, inputs, ids_TK, torch.float32, backend="cpu")
    assert got["out"].shape == (0, 8) and not any(t.any() for t in got.values())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ids_TK": torch.full((6, 2), 4)}, "ids go from 4 to 4, but the experts are 0 to 3"),
        ({"ids_TK": torch.full((6, 2), -1)}, "ids go from -1"),
        ({"ids_TK": torch.zeros(6, 2)}, "ids are int64, not torch.float32"),
        ({"ids_TK": torch.zeros(5, 2, dtype=torch.int64)}, "ids and weights are .T, K., K > 0, and x .T, D."),
        ({"activation": "relu2"}, "with relu2 x is .N, D. and w13 .e, 1, F, D."),
        ({"backend": "triton"}, "expert backend 'triton' cannot run"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, object], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs, ids_TK = make_layer(T=6, K=2, E=4, D=8, F=8)
    with pytest.raises(ValueError, match=complaint) as error:
        moe_mlp(**{"ids_TK": ids_TK, **inputs} | change)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
