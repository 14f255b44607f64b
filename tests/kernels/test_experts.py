"""Every backend computes what the loop computes in float64: values, and gradients of all inputs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import ACTIVATIONS, activate, expert_mlp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.expert_cases import LOADS, make_case, refused_twice

FAST = ["grouped_mm", "cpu"]  # those that run here; triton: test_triton.py, packages: test_packages.py


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Largest error of each tensor, relative to its largest entry."""
    for name, reference in want.items():
        scale = reference.abs().max().item() if reference.numel() else 0.0
        error = (got[name] - reference).abs().max().item() if reference.numel() else 0.0
        assert error <= tolerance * max(scale, 1.0), f"{name}: {error} against entries up to {scale}"


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = torch.minimum(gate, torch.tensor(7.0)), torch.clip(up, -7, 7)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)


def swiglu_clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = torch.minimum(gate, torch.tensor(10.0)), torch.clip(up, -10, 10)
    return gate / (1 + torch.exp(-gate)) * up


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# as the papers write them: arXiv 2002.05202, 1606.08415, 2109.08668
FORMULAS = {
    "swiglu": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "reglu": lambda gate, up: torch.where(gate > 0, gate, 0.0) * up,
    "gpt_oss": gpt_oss,
    "swiglu_clamped": swiglu_clamped,
    "gelu": gelu,
    "relu2": lambda up: torch.where(up > 0, up, 0.0) ** 2,
}


def by_definition(x_ND, counts, w13, w2, index_R, weight_R, b13, b2, activation):  # type: ignore[no-untyped-def]
    """One row at a time, as the docstring has it."""
    rows, r = [], 0
    for expert, n in enumerate(counts):
        for _ in range(n):
            x = x_ND[index_R[r]]
            a = FORMULAS[activation](*(w @ x + b for w, b in zip(w13[expert], b13[expert], strict=True)))
            rows.append(weight_R[r] * (w2[expert] @ a + b2[expert]))
            r += 1
    return torch.stack(rows)


def test_swiglu_clamped_is_deepseek_v4s() -> None:
    theirs = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4", reason="an older transformers")
    sizes = SimpleNamespace(hidden_size=8, intermediate_size=6, mlp_bias=False, hidden_act="silu", swiglu_limit=10.0)
    torch.manual_seed(0)
    mlp, x = theirs.DeepseekV4MLP(sizes), 20 * torch.randn(50, 8)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    assert gate.max() > 10 and up.min() < -10
    torch.testing.assert_close(mlp.down_proj(activate([gate, up], "swiglu_clamped")), mlp(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_oracle_is_the_definition(activation: str) -> None:
    case = make_case([3, 0, 5, 2], activation, bias=True)
    inputs = {name: t.clone().requires_grad_() for name, t in case.inputs.items()}
    y = by_definition(**inputs, counts=case.counts, index_R=case.index_R, activation=activation)
    grads = torch.autograd.grad(y, list(inputs.values()), case.upstream_RD)
    want = dict(zip(("y", *inputs), (y.detach(), *grads), strict=True))
    compare(case.run("loop", torch.float64), want, 1e-12)


@pytest.mark.parametrize("counts", LOADS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("gather", [False, True], ids=["ordered", "gathered"])
@pytest.mark.parametrize("weights", [False, True], ids=["unweighted", "weighted"])
def test_backends_match_the_loop(counts: list[int], activation: str, bias: bool, gather: bool, weights: bool) -> None:
    case = make_case(counts, activation, gather=gather, weights=weights, bias=bias)
    want = case.run("loop", torch.float64)
    compare(case.run("cpu", torch.float64), want, 1e-12)
    for backend in FAST:
        compare(case.run(backend, torch.float32), want, 2e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_stays_within_one_percent(backend: str, activation: str) -> None:
    """Against float64 from the same bf16 inputs; 2^-8 is the rounding of one number."""
    case = make_case([33, 0, 64, 7, 96], activation, bias=True, dim=64, expert_dim=32, dtype=torch.bfloat16)
    got, want = case.run(backend, torch.bfloat16), case.run("loop", torch.float64)
    for name in want:
        assert (got[name] - want[name]).norm() < 0.01 * want[name].norm(), name


@pytest.mark.parametrize("backend", [*FAST, "loop"])
def test_float32_parameters_under_bf16_rows(backend: str) -> None:
    """Parameters are rounded where they are used: same output as from rounded ones, gradients in float32."""
    case = make_case([33, 0, 64, 7], bias=True, dim=64, expert_dim=32)
    case.inputs["w13"] /= 8  # keep pre-activations near 1
    got = case.run(backend, torch.bfloat16, parameters=torch.float32)
    want = case.run(backend, torch.bfloat16)
    assert all(torch.equal(got[name], want[name]) for name in ("y", "x_ND", "weight_R"))
    for name in want:
        assert (got[name] - want[name]).norm() <= 0.005 * want[name].norm(), name


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6))
def test_any_loads_in_bf16_match_exact_shapes(counts: list[int]) -> None:
    """The surplus rows of widened products never reach a result: same values as a loop over exact shapes."""
    case = make_case(counts, dim=32, expert_dim=16, dtype=torch.bfloat16)
    got, want = case.run("cpu", torch.bfloat16), case.run("loop", torch.float64)
    for name in want:
        assert (got[name] - want[name]).norm() <= 0.02 * want[name].norm(), name


def test_gradcheck() -> None:
    for activation in ACTIVATIONS:
        case = make_case([2, 0, 3], activation, bias=True, dim=4, expert_dim=3, tokens=4)
        names = list(case.inputs)

        def call(*values: Tensor, case=case, names=names) -> Tensor:  # type: ignore[no-untyped-def]
            inputs = dict(zip(names, values, strict=True))
            return expert_mlp(
                **inputs, counts=case.counts, index_R=case.index_R, activation=case.activation, backend="cpu"
            )

        assert torch.autograd.gradcheck(call, [t.clone().requires_grad_() for t in case.inputs.values()])


@pytest.mark.parametrize(
    ("dtype", "fp8"), [(torch.float32, False), (torch.float64, False), (torch.float32, True)], ids=str
)
def test_a_second_derivative_is_refused(dtype: torch.dtype, fp8: bool) -> None:
    """Compiled, in torch's operations, and in FP8."""
    case = make_case([3, 0, 5])
    x_ND, *rest = (t.to(dtype) for t in case.inputs.values())
    w13, w2, weight_R = rest
    options: dict = {"index_R": case.index_R, "weight_R": weight_R, "backend": "cpu", "fp8": fp8}
    refused_twice(lambda x: expert_mlp(x, case.counts, w13, w2, **options), x_ND)


@pytest.mark.parametrize("backend", [*FAST, "loop"])
def test_awkward_tensors(backend: str) -> None:
    """Rows of a wider tensor as input, an expanded gradient from above, and only some inputs that need gradients."""
    case = make_case([9, 0, 40, 3], gather=False)
    wide = torch.cat((case.inputs["x_ND"], case.inputs["x_ND"]), dim=1).float()
    x = wide[:, : wide.shape[1] // 2].requires_grad_()
    w13, w2 = case.inputs["w13"].float(), case.inputs["w2"].float()
    (got,) = torch.autograd.grad(expert_mlp(x, case.counts, w13, w2, backend=backend).sum(), x)
    x64 = case.inputs["x_ND"].clone().requires_grad_()
    y64 = expert_mlp(x64, case.counts, case.inputs["w13"], case.inputs["w2"], backend="loop")
    (want,) = torch.autograd.grad(y64.sum(), x64)
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again_and_under_checkpoint(dtype: torch.dtype) -> None:
    case = make_case([50, 0, 31, 90], dim=64, expert_dim=32, dtype=dtype)
    inputs = {name: t.to(dtype).requires_grad_() for name, t in case.inputs.items()}

    def call(x_ND: Tensor) -> Tensor:
        rest = {name: t for name, t in inputs.items() if name != "x_ND"}
        return expert_mlp(x_ND, case.counts, index_R=case.index_R, backend="cpu", **rest)  # type: ignore[arg-type]

    def grads(y_RD: Tensor) -> list[Tensor]:
        return [y_RD, *torch.autograd.grad(y_RD, list(inputs.values()), case.upstream_RD.to(dtype))]

    first = grads(call(inputs["x_ND"]))
    again = grads(call(inputs["x_ND"]))
    recomputed = grads(checkpoint(call, inputs["x_ND"], use_reentrant=False))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, recomputed, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_with_its_expert(bad: float) -> None:
    """NaN or infinity in one row reaches what the loop lets it reach, and nothing of another expert."""
    case = make_case([5, 40, 3], gather=False, dtype=torch.bfloat16)
    case.inputs["x_ND"][20, 3] = bad
    got, want = case.run("cpu", torch.bfloat16), case.run("loop", torch.bfloat16)
    for name in want:
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name
    assert got["w13"][[0, 2]].isfinite().all() and got["y"][:5].isfinite().all()


@pytest.mark.parametrize(("activation", "matrices"), [("swiglu", 2), ("relu2", 1)])
def test_keeps_input_and_pre_activation_only(activation: str, matrices: int) -> None:
    """Saved for backward beside the parameters: x, the routing, and the pre-activations, R x 2F of gated experts
    (SonicMoE's 2Td + 4TKn bytes), R x F of plain ones."""
    tokens, top_k, dim, expert_dim = 64, 2, 32, 16
    case = make_case([40, 0, 88], activation, dim=dim, expert_dim=expert_dim, tokens=tokens, dtype=torch.bfloat16)
    inputs = {name: t.bfloat16().requires_grad_() for name, t in case.inputs.items()}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call = {**inputs, "counts": case.counts, "index_R": case.index_R, "activation": activation}
        expert_mlp(**call, backend="cpu")  # type: ignore[arg-type]
    for name in ("w13", "w2", "weight_R"):
        saved.pop(inputs[name].data_ptr())
    assert case.index_R is not None
    saved.pop(case.index_R.data_ptr())
    kept = sum(t.numel() * t.element_size() for t in saved.values())
    assert kept == 2 * tokens * dim + 2 * matrices * tokens * top_k * expert_dim


def test_matches_a_dense_mlp() -> None:
    """One expert that takes every token once is torch's own dense SwiGLU MLP."""
    case = make_case([24], gather=False, weights=False)
    x, w13, w2 = (case.inputs[name] for name in ("x_ND", "w13", "w2"))
    want = F.linear(F.silu(F.linear(x, w13[0, 0])) * F.linear(x, w13[0, 1]), w2[0])
    assert torch.allclose(expert_mlp(x, case.counts, w13, w2), want, rtol=1e-12)
