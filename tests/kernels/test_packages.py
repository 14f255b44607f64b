"""Backends of packages, on stand-ins with the calls that these document: what they are handed (layouts, orders,
offsets, dtypes) and what is made of the result, against the loop in float64. None of the real ones has been run.
"""

from __future__ import annotations

import sys

import pytest
import torch
from moe_kernels import api, choose_backend, moe_mlp
from moe_kernels.packages import PACKAGES
from torch import Tensor

from tests.kernels.expert_cases import LOADS, make_case
from tests.kernels.fake_packages import install, install_all
from tests.kernels.layer_cases import by_definition, make_layer, run
from tests.kernels.test_experts import compare

# sonicmoe takes routing weights in float32, deep_gemm makes weight gradients in it
TOLERANCE = dict.fromkeys(PACKAGES, 1e-12) | {"sonicmoe": 1e-6, "deep_gemm": 1e-6}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins, and nothing that keeps them off the CPU."""
    install_all(monkeypatch)
    for name in PACKAGES:
        monkeypatch.setitem(api._PATHS, name, api._PATHS[name]._replace(obstacle=lambda setting: None))


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("counts", LOADS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"gather": False, "weights": False}, {"activation": "geglu", "bias": True}],
    ids=str,
)
def test_matches_the_loop(backend: str, counts: list[int], options: dict[str, object]) -> None:
    """Values, and gradients of all inputs; empty experts get gradients of zeros."""
    case = make_case(counts, **options)  # type: ignore[arg-type]
    compare(case.run(backend, torch.float64), case.run("loop", torch.float64), TOLERANCE[backend])


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_its_definition(backend: str, bias: bool) -> None:
    """Where packages gather by token and sum a token's rows themselves. The last expert is empty."""
    inputs, ids_TK = make_layer(T=7, K=3, E=6, D=16, F=8, bias=bias)
    want = run(by_definition, inputs, ids_TK, torch.float64)
    compare(run(moe_mlp, inputs, ids_TK, torch.float64, backend=backend), want, TOLERANCE[backend])


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", [name for name in PACKAGES if name != "sonicmoe"])
@pytest.mark.parametrize("activation", ["gpt_oss", "relu2", "gelu", "reglu"])
def test_other_activations(backend: str, activation: str) -> None:
    case = make_case([5, 0, 9], activation, bias=True)
    compare(case.run(backend, torch.float64), case.run("loop", torch.float64), TOLERANCE[backend])


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", PACKAGES)
def test_expanded_gradients_and_one_missing_bias(backend: str) -> None:
    """y.sum() hands kernels a gradient without memory of its own; biases may come one at a time."""
    case = make_case([5, 0, 9], bias=True)
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if name != "b13"}

    def gradients(backend: str) -> tuple[Tensor, ...]:
        y_RD = api.expert_mlp(**leaves, counts=case.counts, index_R=case.index_R, backend=backend)
        return torch.autograd.grad(y_RD.sum(), list(leaves.values()))

    for got, want in zip(gradients(backend), gradients("loop"), strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "device", "change", "complaint"),
    [
        *((name, "cpu", {}, f"{name} needs an NVIDIA GPU") for name in PACKAGES),
        ("sonicmoe", "cuda", {}, r"sonicmoe is not installed \(pip install sonic-moe, on Python 3.12 or later\)"),
        ("scattermoe", "cuda", {}, r"scattermoe is not installed \(pip install git\+https://github.com/shawntan/sc"),
        ("grouped_gemm", "cuda", {}, r"not installed \(pip install --no-build-isolation grouped_gemm\)"),
        ("transformer_engine", "cuda", {}, r"not installed \(pip install transformer-engine\[pytorch\]\)"),
        ("deep_gemm", "cuda", {}, r"deep_gemm is not installed \(clone github.com/deepseek-ai/DeepGEMM"),
        *((name, "cuda", {"dtype": torch.float64}, f"{name} does not take float64") for name in PACKAGES),
        ("scattermoe", "cuda", {"dtype": torch.float32}, "scattermoe does not take float32"),
        ("grouped_gemm", "cuda", {"dtype": torch.float16}, "grouped_gemm does not take float16"),
        ("grouped_gemm", "cuda", {"dim": 36}, "needs D to be a multiple of 8, and D is 36"),
        ("sonicmoe", "cuda", {"expert_dim": 12}, "needs F to be a multiple of 8, and F is 12"),
        ("sonicmoe", "cuda", {"activation": "relu2"}, "sonicmoe has swiglu and geglu, not relu2"),
    ],
)
def test_what_cannot_run_is_refused(backend: str, device: str, change: dict[str, object], complaint: str) -> None:
    """Nothing is installed here, and there is no GPU. The line says how to get the package."""
    settings: dict[str, object] = {"dtype": torch.bfloat16, "dim": 64, "expert_dim": 32}
    with pytest.raises(ValueError, match=f"expert backend '{backend}' cannot run: .*{complaint}.*; use") as error:
        choose_backend(backend, device, **settings | change)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins look installed to a real GPU")
def test_an_installed_package_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is still not what "auto" takes."""
    install_all(monkeypatch)
    for name in PACKAGES:
        assert choose_backend(name, "cuda", torch.bfloat16, 64, 32) == (name, "asked for")
    assert choose_backend("auto", "cuda", torch.bfloat16, 64, 32)[0] not in PACKAGES


def test_versions_that_do_not_fit_or_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "deep_gemm", __version__="2.9.0")
    install(monkeypatch, "scattermoe.parallel_experts", parallel_linear=lambda inputs, w, k, s, r, padded_block_idxs: 0)
    install(monkeypatch, "sonicmoe", moe_general_routing_inputs=lambda x, router_scores, stream_id: 0)

    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "grouped_gemm":
                raise OSError("libc10.so: undefined symbol\nmore lines")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name, complaint in (
        ("scattermoe", "is too old: its parallel_linear wants padded blocks"),
        ("sonicmoe", "is older than 0.1.2"),
        ("deep_gemm", "deep_gemm is 2.9.0, and 2.1 to 2.8 are known"),
        ("grouped_gemm", "cannot be imported: OSError: libc10.so: undefined symbol; use"),
    ):
        with pytest.raises(ValueError, match=complaint):
            choose_backend(name, "cuda", torch.bfloat16, 64, 32)
