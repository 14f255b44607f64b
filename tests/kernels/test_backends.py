"""Backends are chosen by what can run; what cannot is refused in one line that says why."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import get_args

import pytest
import torch
from moe_kernels import ACTIVATIONS, BACKENDS, choose_backend, expert_mlp, grouped_mm

from moetrain.config.schema import Activation, ExpertBackend
from tests.kernels.expert_cases import Case, make_case


def test_auto_says_what_it_took_and_why() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert choose_backend("auto", "cpu", dtype, 7, 5)[0] == "cpu"
    on_gpu = "grouped_mm" if importlib.util.find_spec("triton") is None else "triton"
    assert choose_backend("auto", "cuda", torch.bfloat16, 512, 256)[0] == on_gpu
    name, why = choose_backend("auto", "cuda", torch.float64, 512, 256)
    assert name == "loop" and "float64" in why
    assert choose_backend("loop", "cpu", torch.float32, 8, 8) == ("loop", "asked for")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "dim", "complaint"),
    [
        ("grouped_mn", "cpu", torch.float32, 8, "no expert backend is called 'grouped_mn'; known: auto, fastest, loop"),
        ("grouped_mm", "cpu", torch.float64, 8, "does not take float64 on cpu"),
        ("grouped_mm", "cpu", torch.float32, 7, "D to be a multiple of 4"),
        ("grouped_mm", "cpu", torch.bfloat16, 12, "D to be a multiple of 8"),
        ("cpu", "cuda", torch.bfloat16, 8, "cannot run: it is for the CPU, and this is cuda; use 'auto' or 'loop'"),
        ("triton", "cpu", torch.float32, 8, "cannot run: (triton is not installed|.* this is the CPU); use"),
        ("triton", "cuda", torch.float64, 8, "cannot run: (triton is not installed|.* do not take float64); use"),
        ("triton", "mps", torch.float32, 8, "cannot run: (triton is not installed|.* do not run on mps); use"),
    ],
)
def test_a_forced_backend_that_cannot_run(
    backend: str, device: str, dtype: torch.dtype, dim: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        choose_backend(backend, device, dtype, dim, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("fastest", "loop")])
def test_a_dtype_is_computed_or_refused(backend: str, dtype: torch.dtype) -> None:
    """Every path either matches the loop in it, or says in one line why not; "auto" always finds one."""
    case = make_case([5, 0, 9], dtype=dtype, dim=16, expert_dim=8)
    try:
        name, _ = choose_backend(backend, "cpu", dtype, 16, 8)
    except ValueError as error:
        assert backend not in ("auto", "cpu") and "\n" not in str(error)
        assert "float64" in str(error) or backend != "grouped_mm"
        with pytest.raises(ValueError, match="cannot run"):
            case.run(backend, dtype)
        return
    assert (name, dtype) != ("grouped_mm", torch.float64)
    got, want = case.run(backend, dtype), case.run("loop", torch.float64)
    for key in want:
        assert (got[key] - want[key]).norm() <= (4e-3 if dtype == torch.float16 else 1e-12) * want[key].norm(), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_auto_without_a_grouped_product_says_so(dtype: torch.dtype) -> None:
    """CUDA's takes bfloat16. The reason is the line that a run logs."""
    name, why = choose_backend("auto", "cuda", dtype, 16, 8)
    assert name == "loop" and why == f"torch's grouped_mm does not take {str(dtype)[6:]} on cuda"


def _change(case: Case, name: str) -> dict[str, object]:
    args: dict[str, object] = {**case.inputs, "counts": case.counts, "index_R": case.index_R, "backend": "cpu"}
    changes: dict[str, dict[str, object]] = {
        "sum": {"counts": [3, 3]},
        "negative": {"counts": [-1, 6]},
        "length": {"counts": [5]},
        "activation": {"activation": "swish"},
        "dtype": {"w2": case.inputs["w2"].float()},
        "wider": {"w13": case.inputs["w13"].float(), "w2": case.inputs["w2"].float()},
        "width": {"w2": case.inputs["w2"][:, :, 1:]},
        "w13": {"w13": case.inputs["w13"].flatten(1, 2)},
        "plain": {"activation": "relu2"},
        "weights": {"weight_R": case.inputs["weight_R"][1:]},
        "x": {"x_ND": case.inputs["x_ND"][:, 1:]},
        "bias": {"b13": case.inputs["w13"][..., 0].flatten(1)},
        "index": {"index_R": torch.arange(5, dtype=torch.int32)},
        "floats": {"counts": [2.5, 2.5]},
        "table": {"counts": torch.tensor([[2], [3]])},
        "device": {"w2": case.inputs["w2"].to("meta")},
        "index's device": {"index_R": torch.arange(5, device="meta")},
        "no experts": {name: case.inputs[name][:0] for name in ("w13", "w2")} | {"counts": []},
        "no width": {"w13": case.inputs["w13"][:, :, :0], "w2": case.inputs["w2"][..., :0]},
    }
    return args | changes[name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("sum", "counts must be 2 row numbers that sum to 5, not 2 that sum to 6"),
        ("negative", "counts must be"),
        ("length", "counts must be"),
        (
            "activation",
            "no activation is called 'swish'; known: swiglu, geglu, .*, swiglu_clamped, gelu, relu2",
        ),
        ("dtype", "w2 is torch.float32 but w13 is torch.float64"),
        ("wider", "w13 is torch.float32 but x is torch.float64"),
        ("width", "w2 has shape"),
        ("w13", "with swiglu x is .N, D. and w13 .e, 2, F, D."),
        ("plain", "with relu2 .* w13 .e, 1, F, D., not .* .2, 2, 8, 16."),
        ("weights", "weight_R has shape .4,. where"),
        ("x", "x has shape"),
        ("bias", "b13 has shape"),
        ("index", "index_R is int64, not torch.int32"),
        ("floats", "counts must be integers, not floats"),
        ("table", r"counts must be integers \(2,\), not torch.int64 of shape \(2, 1\)"),
        ("device", "experts: tensors are on cpu and on meta; bring them to one device"),
        ("index's device", "tensors are on cpu and on meta"),
        ("no experts", r"w13 has shape \(0, 2, 8, 16\); \(e, 2, F, D\) are all 1 or more"),
        ("no width", r"w13 has shape \(2, 2, 0, 16\)"),
    ],
)
def test_inputs_that_do_not_fit(change: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        expert_mlp(**_change(make_case([2, 3]), change))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "cpu"])
def test_autocast_changes_nothing(backend: str) -> None:
    """In no backend: in some torch's operators would be cast, others are compiled."""
    case = make_case([5, 0, 9], bias=True)
    inputs = {name: t.float() for name, t in case.inputs.items()}

    def run() -> list[torch.Tensor]:
        y = expert_mlp(**inputs, counts=case.counts, index_R=case.index_R, backend=backend)
        return [y, grouped_mm(y, inputs["w13"].flatten(1, 2), case.counts, backend=backend)]

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


def test_a_config_can_ask_for_every_activation_and_backend() -> None:
    assert get_args(Activation) == tuple(ACTIVATIONS)
    assert get_args(ExpertBackend) == BACKENDS


def test_freed_memory_is_reused_not_mapped_again() -> None:
    """In a process of its own: once warm, 100 blocks of 64 MB cost fewer page faults than 10 would (16384 each)."""
    code = (
        "import resource, torch; from moe_kernels import keep_freed_memory; kept = keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "torch.zeros(2**24); before = faults()\n"
        "for _ in range(100): torch.zeros(2**24)\n"
        "print(int(kept), faults() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert faults < 10 * 16384
