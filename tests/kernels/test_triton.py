"""The Triton path in Triton's interpreter, on the CPU: it computes what the loop computes in float64.

Tiles are 16 x 16 there, so that these sizes have many of them and end within one. The interpreter must be asked for
before the kernels are imported, and other tests want none; so these run in a process of their own: the first starts it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_kernels import expert_mlp, moe_mlp

from moetrain.planner.fused import scratch
from moetrain.planner.stage_run import Live
from tests.kernels.expert_cases import make_case, refused_twice
from tests.kernels.late_cases import check, experts
from tests.kernels.layer_cases import by_definition, kept_bytes, make_layer, run
from tests.kernels.test_experts import compare
from tests.kernels.test_grouped_mm import check_against_definition

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import tests.kernels.interpreter  # noqa: F401
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")


def run_interpreted(file: str) -> None:
    """Run the tests of ``file`` in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file]
    root = Path(__file__).parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("counts", [[37, 0, 5, 20], [0, 0, 33, 0], [0, 0]], ids=str)
def test_the_product_alone(counts: list[int]) -> None:
    check_against_definition("triton", counts, torch.float32, torch.float32)


@interpreted
@pytest.mark.parametrize(
    ("counts", "activation", "options"),
    [
        ([37, 0, 5, 20], "swiglu", {"bias": True}),  # uneven, one empty; gathered, weighted
        ([0, 0, 33, 0], "gpt_oss", {"bias": True}),  # one expert takes all
        ([12, 7], "swiglu_clamped", {}),
        ([3, 16, 1], "relu2", {"gather": False, "bias": True}),  # one input matrix; rows in order
        ([17, 0], "geglu", {"weights": False, "bias": True}),
        ([4, 9], "gelu", {}),
        ([9, 4], "reglu", {"gather": False, "weights": False}),
        ([0, 0, 0], "swiglu", {"bias": True}),  # no rows at all
    ],
    ids=str,
)
def test_matches_the_loop(counts: list[int], activation: str, options: dict[str, bool]) -> None:
    """Values, and gradients of all inputs. No size is a multiple of the tile's."""
    case = make_case(counts, activation, dim=24, expert_dim=40, **options)  # type: ignore[arg-type]
    compare(case.run("triton", torch.float32), case.run("loop", torch.float64), 2e-5)


@interpreted
@pytest.mark.parametrize(("dim", "expert_dim", "readers"), [(32, 16, 0), (64, 128, 6)], ids=["plain", "copy engine"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
def test_half_precision(
    dtype: torch.dtype, tolerance: float, dim: int, expert_dim: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter cuts numbers off where they become bf16: twice the error of rounding, and all of one sign. Widths
    that Hopper's copy engine can read are read as it would."""
    from moe_kernels.gpu import experts

    given = []
    make = experts.matrix_reader
    monkeypatch.setattr(experts, "matrix_reader", lambda *args: given.append(make(*args)) or given[-1])
    case = make_case([21, 0, 12], bias=True, dim=dim, expert_dim=expert_dim, dtype=dtype)
    got, want = case.run("triton", dtype), case.run("loop", torch.float64)
    assert sum(reader is not None for reader in given) == readers
    for name in want:
        assert (got[name] - want[name]).norm() < tolerance * want[name].norm(), name


@interpreted
def test_a_layer_is_its_definition() -> None:
    """Gathered, weighted and summed per token inside; an expert is empty; a token has more rows than are unrolled."""
    inputs, ids_TK = make_layer(T=7, K=17, E=19, D=24, F=20, bias=True)
    want = run(by_definition, inputs, ids_TK, torch.float64)
    compare(run(moe_mlp, inputs, ids_TK, torch.float32, backend="triton"), want, 2e-5)


@interpreted
def test_rows_past_the_counts_give_zeros() -> None:
    """As in a buffer of fixed size that is not full; with counts on the device nothing is known of them. They may be a
    column of a table."""
    case = make_case([5, 18], bias=True)
    args = {name: t.float().requires_grad_() for name, t in case.inputs.items()}
    extra = 20
    args["weight_R"] = torch.cat([args["weight_R"], torch.ones(extra)]).detach().requires_grad_()
    index_R = torch.cat([case.index_R, torch.zeros(extra, dtype=torch.int64)])  # type: ignore[list-item]
    counts = torch.tensor([[5, 9], [18, 9]])[:, 0]
    y_RD = expert_mlp(**args, counts=counts, index_R=index_R, backend="triton")
    upstream = torch.cat([case.upstream_RD.float(), torch.ones(extra, y_RD.shape[1])])
    grads = dict(zip(args, torch.autograd.grad(y_RD, list(args.values()), upstream), strict=True))
    assert not y_RD[-extra:].any() and not grads["weight_R"][-extra:].any()
    want = case.run("loop", torch.float64)
    grads["weight_R"] = grads["weight_R"][:-extra]
    compare({"y": y_RD[:-extra].detach().double(), **{k: g.double() for k, g in grads.items()}}, want, 2e-5)


@interpreted
def test_torchs_settings_of_float32_products() -> None:
    """By the older of torch's two settings or the newer; where the newer says TF32, the older cannot be asked."""
    from moe_kernels.gpu.experts import _precision

    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        found = {}
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = _precision()
        matmul.fp32_precision = "tf32"
        found["newer"] = _precision()
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)
    assert found == {"high": "tf32", "highest": "ieee", "newer": "tf32"}


@interpreted
@pytest.mark.parametrize("fp8", [False, True])
def test_a_second_derivative_is_refused(fp8: bool) -> None:
    x, w13, w2 = make_case([3, 4], gather=False, weights=False, dtype=torch.float16).inputs.values()
    w13, w2 = w13.float(), w2.float()
    refused_twice(lambda x: expert_mlp(x, [3, 4], w13, w2, backend="triton", fp8=fp8), x.float())


@interpreted
@pytest.mark.parametrize(("K", "F"), [(2, 32), (4, 16)], ids=["coarse", "fine"])
def test_memory_does_not_depend_on_granularity(K: int, F: int) -> None:
    T, D = 20, 32
    assert kept_bytes(T, K, 6, D, F, "triton") == 2 * T * D + 4 * T * K * F


@interpreted
def test_same_bits_again_and_one_graph_under_compile() -> None:
    """Both passes are operators to torch.compile: it finds one graph, and the same result, bit for bit."""
    inputs, ids_TK = make_layer(T=9, K=2, E=4, D=16, F=16)

    def layer(**args: torch.Tensor) -> torch.Tensor:
        return moe_mlp(**args, backend="triton")  # type: ignore[arg-type]

    first, again = (run(layer, inputs, ids_TK, torch.float32) for _ in range(2))
    whole = run(torch.compile(layer, backend="aot_eager", fullgraph=True), inputs, ids_TK, torch.float32)
    assert all(torch.equal(first[k], again[k]) and torch.equal(first[k], whole[k]) for k in first)


@interpreted
def test_a_bad_row_stays_with_its_expert() -> None:
    """A NaN reaches what the loop lets it reach, and no other expert's tile, gradient or row."""
    case = make_case([5, 20, 3], gather=False)
    case.inputs["x_ND"][20, 3] = float("nan")
    got, want = case.run("triton", torch.float32), case.run("loop", torch.float64)
    for name in want:
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name


@interpreted
def test_weights_gradients_do_not_depend_on_the_tuned_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: ranks tune apart, and one may tune anew in the middle of a run. Of a routing weight's gradient, the
    sum along a row; products are of numbers so round that they are exact in every order."""
    from moe_kernels.gpu import products
    from moe_kernels.gpu.tiles import COLUMNS, config

    case = make_case([21, 0, 12], expert_dim=72)
    for tensor in (*case.inputs.values(), case.upstream_RD):
        tensor.mul_(8).round_().div_(8)
    found = []
    for wider in (1, 2, 4):
        monkeypatch.setattr(
            products.down_gradient, "configs", [config(wider * COLUMNS, 4, 2, DEPTH_BYTES=64, PER_SM=1)]
        )
        found.append(case.run("triton", torch.float32)["weight_R"])
    assert found[0].any() and all(torch.equal(other, found[0]) for other in found[1:])


@interpreted
def test_kernels_are_tuned_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again where a rank's rows change in the middle of training, unless they are 16 times as many; but again where
    the copy engine cannot read what it read before, since the choice is among other configurations then. Nothing runs
    but the tuner."""
    from moe_kernels.gpu import experts, products, tiles

    kernels = (products.up_projection, products.rows_times_weights, products.down_gradient, products.weight_gradient)
    tuned: list[str] = []
    monkeypatch.setattr(tiles, "_classes", set())
    for kernel in kernels:
        monkeypatch.setattr(kernel, "configs", [*kernel.configs, kernel.configs[0]])
        monkeypatch.setattr(kernel, "early_config_prune", lambda configs, *_, **__: configs[:1])
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setattr(kernel.fn, "run", lambda *_, **__: None)
        monkeypatch.setitem(vars(kernel), "do_bench", lambda call, quantiles: tuned.append("once") or [1.0] * 3)

    def tunings(rows: int) -> int:
        """Of a layer, forward and backward: two products are made by ``rows_times_weights``, as are two by
        ``weight_gradient``."""
        tuned.clear()
        make_case([rows, rows], dim=64, expert_dim=64).run("triton", torch.float16)
        return len(tuned)

    assert [tunings(rows) for rows in (2, 1, 16, 17, 15)] == [6, 0, 0, 6, 0]
    monkeypatch.setattr(experts, "matrix_reader", lambda *_: None)
    assert tunings(2) == 4  # weight gradients are read by pointers anyway


@interpreted
@pytest.mark.parametrize("fp8", [False, True])
def test_a_dry_run_knows_what_backward_holds_beside_its_results(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is made in the operator, counted, against ``planner.fused.scratch``. What kernels would write into it
    does not matter, and they do not run."""
    from moe_kernels.gpu import experts, fp8_experts

    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *args, **kwargs: None)
    e, F, D, N, R = 2, 256, 256, 256, 512
    w13, w2, counts_e = torch.randn(e, 2, F, D), torch.randn(e, D, F), torch.tensor([R // 2, R // 2])
    x_ND, index_R, s_R = torch.randn(N, D).half(), torch.arange(R) // 2, torch.rand(R)
    inputs = (x_ND, w13, w2, s_R, None, None, index_R, None, counts_e)
    made = fp8_experts if fp8 else experts
    _, *kept = made._forward.fn(*inputs, "swiglu")
    dy, biases = torch.randn(R, D).half(), [False] * 2
    args: tuple[Any, ...] = (dy, *inputs[1:], *kept, "swiglu", [True] * 4 + biases)
    if not fp8:  # another operator makes the gradients of matrices
        args = (dy, *inputs, *kept, "swiglu", [True] * 2 + biases, torch.float32)
    known = torch.nn.ParameterList(
        torch.nn.Parameter(t, requires_grad=False) for t in args if isinstance(t, torch.Tensor)
    )
    with Live(known) as live:
        grads = made._backward.fn(*args)
    name = f"moe_kernels::{'fp8_' * fp8}experts_backward"
    assert scratch(name, args) == pytest.approx(live.most - sum(g.nbytes for g in grads), rel=0.2)


@interpreted
@pytest.mark.parametrize("per_token", [False, True])
def test_gradients_of_matrices_may_come_late(per_token: bool) -> None:
    """Then they are the same, and need no weights (``tests/kernels/test_late.py``)."""
    check(*experts("triton", torch.float32, torch.float32, per_token), {1, 2})
