"""The FP8 kernels in Triton's interpreter: the emulation's numbers, bit for bit where both add in one order.

Tiles are 128 x 128 as on a GPU. Both make a tile's sum exactly, and both add tiles in order; what remains are sums over
rows and columns outside the products, and the exponential in smooth activations.
"""

from __future__ import annotations

import pytest
import torch
from moe_kernels import expert_mlp, moe_mlp
from moe_kernels import quantize_blocks as blocks
from moe_kernels import quantize_rows as rows
from torch import Tensor

from tests.kernels.expert_cases import make_case
from tests.kernels.layer_cases import make_layer, run
from tests.kernels.test_fp8 import distance, in_fp8, kept_bytes, spread
from tests.kernels.test_triton import INTERPRETED, interpreted, run_interpreted

if INTERPRETED:
    from moe_kernels.gpu import fp8_experts as triton


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@interpreted
def test_quantises_to_the_same_numbers() -> None:
    """Of all magnitudes, and of what is not finite; compared as numbers, since a zero may lose its sign."""
    bad = spread(4, 300)
    bad[1, 3], bad[2, 200], bad[3] = float("nan"), float("-inf"), 0
    for x in (spread(5, 300), spread(130, 257), spread(40, 128, dtype=torch.bfloat16), bad):
        for got, want in (
            (triton.quantize_rows(x), rows(x)),
            (triton.quantize_rows(x, pow2=True), rows(x, pow2=True)),
            (triton.quantize_blocks(x), blocks(x)),
            (triton.quantize_blocks(x, transposed=True), blocks(x.t())),
        ):
            assert torch.equal(got[0].float(), want[0].float()) and torch.equal(got[1], want[1])


@interpreted
@pytest.mark.parametrize(
    ("counts", "activation", "bias"),
    [([37, 0, 5, 170], "reglu", True), ([0, 129, 0], "relu2", True), ([3, 1], "reglu", False)],
    ids=str,
)
def test_a_layer_is_the_emulation_bit_for_bit(counts: list[int], activation: str, bias: bool) -> None:
    """Output, gradients of x and of both weights. No size is a multiple of 128, an expert has two tiles of rows."""
    case = make_case(counts, activation, gather=False, bias=bias, dim=160, expert_dim=136, dtype=torch.float32)
    got, want = in_fp8(case, torch.float32, "triton"), in_fp8(case, torch.float32)
    for name in ("y", "x_ND", "w13", "w2"):
        assert torch.equal(got[name], want[name]), name
    others = {name: t for name, t in want.items() if name in ("weight_R", "b13", "b2")}
    assert max(distance(got, others).values()) < 1e-6


@interpreted
@pytest.mark.parametrize("options", [{"bias": True}, {"weights": False}, {"gather": False}], ids=str)
def test_a_smooth_activation_differs_by_rounding(options: dict[str, bool]) -> None:
    """Of the exponential; it may send a number to the E4M3 number beside it, one in many thousands."""
    for activation, counts in (("swiglu", [7, 0, 40]), ("gelu", [0, 0, 0]), ("gpt_oss", [20, 9, 0])):
        case = make_case(counts, activation, dim=72, expert_dim=40, dtype=torch.float32, **options)  # type: ignore[arg-type]
        assert max(distance(in_fp8(case, torch.float32, "triton"), in_fp8(case, torch.float32)).values()) < 2e-3


@interpreted
def test_half_precision() -> None:
    """The interpreter cuts numbers off where they become bf16, which moves some to the E4M3 number beside theirs."""
    case = make_case([21, 0, 12], bias=True, dim=160, expert_dim=136, dtype=torch.bfloat16)
    got, emulated = in_fp8(case, torch.bfloat16, "triton"), in_fp8(case, torch.bfloat16)
    assert max(distance(got, emulated).values()) < 0.04
    assert max(distance(got, case.run("loop", torch.float64)).values()) < 0.1


@interpreted
def test_a_whole_layer() -> None:
    """Gathered, weighted and summed per token inside; the same bits again, and in one graph under torch.compile."""
    inputs, ids_TK = make_layer(T=9, K=2, E=3, D=40, F=24, bias=True, dtype=torch.float32)

    def layer(backend: str = "triton", **args: Tensor) -> Tensor:
        return moe_mlp(**args, activation="reglu", fp8=True, backend=backend)

    first, again = (run(layer, inputs, ids_TK, torch.float32) for _ in range(2))
    whole = run(torch.compile(layer, backend="aot_eager", fullgraph=True), inputs, ids_TK, torch.float32)
    assert all(torch.equal(first[k], again[k]) and torch.equal(first[k], whole[k]) for k in first)
    assert max(distance(first, run(layer, inputs, ids_TK, torch.float32, backend="cpu")).values()) < 1e-6


@interpreted
def test_rows_past_the_counts_give_zeros() -> None:
    case = make_case([5, 18], "reglu", gather=False, bias=True, dtype=torch.float32)
    args = {name: t.float() for name, t in case.inputs.items()}
    for name in ("x_ND", "weight_R"):
        args[name] = torch.cat([args[name], torch.ones(20, *args[name].shape[1:])])
    args = {name: t.requires_grad_() for name, t in args.items()}
    y_RD = expert_mlp(**args, counts=torch.tensor([5, 18]), activation="reglu", backend="triton", fp8=True)
    upstream = torch.cat([case.upstream_RD.float(), torch.ones(20, y_RD.shape[1])])
    got = dict(zip(args, torch.autograd.grad(y_RD, list(args.values()), upstream), strict=True)) | {"y": y_RD.detach()}
    want = in_fp8(case, torch.float32)
    for name in ("y", "x_ND", "weight_R"):
        assert not got[name][-20:].any(), name
        got[name] = got[name][:-20]
    assert max(distance({name: t.double() for name, t in got.items()}, want).values()) < 1e-6


@interpreted
def test_a_bad_row_stays_with_its_expert() -> None:
    case = make_case([5, 20, 3], gather=False)
    case.inputs["x_ND"][20, 3] = float("nan")
    got, want = in_fp8(case, torch.float32, "triton"), case.run("loop", torch.float64)
    for name in want:
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name


@interpreted
def test_backward_keeps_x_as_its_numbers() -> None:
    T, K, D, F = 20, 2, 160, 32
    assert kept_bytes(T, K, 6, D, F, "triton") == T * (D + 4 * 2) + 4 * T * K * F
