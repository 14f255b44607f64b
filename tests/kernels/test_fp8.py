"""Experts in FP8: numbers and scales of the recipe to the bit, a layer that follows it, and near what it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moe_kernels import choose_backend, dequantize, moe_mlp, quantize_blocks, quantize_rows
from torch import Tensor

from tests.kernels import fp8_oracle
from tests.kernels.expert_cases import Case, make_case
from tests.kernels.layer_cases import by_definition, make_layer, run


def spread(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of all magnitudes from 2^-18 to 2^10, so that many fall below E4M3's normal ones."""
    g = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=g) * 2 ** (torch.rand(*shape, generator=g) * 28 - 18)).to(dtype)


def by_tile(x: Tensor, rows: int, columns: int, pow2: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales by the oracle's table; the divisions are float32's."""
    x_np = x.float().numpy()
    q = np.empty(x_np.shape, np.uint8)
    scales = np.empty((-(-x_np.shape[0] // rows), -(-x_np.shape[1] // columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        tile = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scales[i, j] = fp8_oracle.scale_of(x_np[tile], pow2) if pow2 else abs(x_np[tile]).max() / np.float32(448)
        q[tile] = fp8_oracle.codes((x_np[tile] / scales[i, j]).astype(np.float64))
    return q, scales


@pytest.mark.parametrize("shape", [(5, 300), (1, 128), (3, 7), (130, 257)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_scales_are_those_of_the_recipe(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = spread(*shape, dtype=dtype)
    for quantize, tile in (
        (quantize_rows, (1, 128, False)),
        (lambda t: quantize_rows(t, pow2=True), (1, 128, True)),
        (lambda t: quantize_rows(t, tile=32), (1, 32, False)),
        (quantize_blocks, (128, 128, False)),
    ):
        q, scales = quantize(x)
        want_q, want_scales = by_tile(x, *tile)
        np.testing.assert_array_equal(scales.numpy(), want_scales)
        np.testing.assert_array_equal(q.view(torch.uint8).numpy(), want_q)


def test_every_number_comes_back_within_half_a_step() -> None:
    """2^-4 of a normal number; half of E4M3's smallest step, 2^-9 scales, of one below."""
    for x, (q, scales), tile in (
        (spread(40, 300), quantize_rows(spread(40, 300)), (1, 128)),
        (spread(140, 300), quantize_blocks(spread(140, 300)), (128, 128)),
    ):
        scale = torch.ones_like(q.float()) * dequantize(torch.ones_like(x).to(q.dtype), scales)
        assert scales.shape == (-(-x.shape[0] // tile[0]), 3)
        error = (dequantize(q, scales) - x).abs()
        normal = x.abs() >= scale * 2**-6
        assert 0.2 < normal.float().mean() < 0.8
        assert (error <= x.abs() * 2**-4)[normal].all() and (error <= scale * 2**-10 * 1.001)[~normal].all()


def test_blocks_of_the_transpose_are_the_transposed_blocks() -> None:
    w = spread(3, 2, 200, 130)
    (q, scales), (q_t, scales_t) = quantize_blocks(w), quantize_blocks(w.transpose(-2, -1))
    assert torch.equal(scales.mT, scales_t) and torch.equal(q.mT.float(), q_t.float())


def test_powers_of_two_lose_nothing_when_quantised_again() -> None:
    """Along the other dimension, as in the gradient of a weight. Other scales lose there."""
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))

    def changed(pow2: bool) -> float:
        once = dequantize(*quantize_rows(x, pow2=pow2))
        twice = dequantize(*quantize_rows(once.t(), pow2=pow2)).t()
        large = once.abs() > 2**-5  # of the largest numbers, about 4, what is smaller falls below E4M3's normal ones
        return float((once != twice)[large].float().mean())

    assert changed(pow2=True) == 0 and changed(pow2=False) > 0.5


def test_zeros_tiny_numbers_and_what_is_not_finite() -> None:
    x = torch.ones(5, 256)
    x[0] = 0
    x[1, 3], x[2, 3], x[3, 130] = float("nan"), float("inf"), -float("inf")
    x[4] *= 1e-42
    back = dequantize(*quantize_rows(x))
    assert not back[0].any() and not back[4].isnan().any() and back[4].max() <= 1e-41
    bad = back.isnan()
    assert bad[1, :128].all() and bad[2, :128].all() and bad[3, 128:].all() and bad.sum() == 3 * 128
    assert torch.equal(back[1:4][~bad[1:4]], x[1:4][~bad[1:4]])
    assert dequantize(*quantize_blocks(x)).isnan().all()


@pytest.mark.parametrize("bad", ["dtype", "dims", "tile", "scales"])
def test_bad_input_is_refused_in_one_line(bad: str) -> None:
    calls = {
        "dtype": (lambda: quantize_rows(torch.zeros(2, 2, dtype=torch.float64)), "not of torch.float64"),
        "dims": (lambda: quantize_blocks(torch.zeros(3)), "FP8 is made of matrices"),
        "tile": (lambda: quantize_rows(torch.zeros(2, 2), tile=0), "1 number or more on a side, not 0"),
        "scales": (lambda: dequantize(*quantize_rows(torch.zeros(3, 300)), tile=64), "fit no tiles of 64"),
    }
    call, complaint = calls[bad]
    with pytest.raises(ValueError, match=complaint) as error:
        call()
    assert "\n" not in str(error.value)


def in_fp8(case: Case, dtype: torch.dtype, backend: str = "cpu") -> dict[str, Tensor]:
    return case.run(backend, dtype, fp8=True)


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor the norm of the error, relative to the norm of what is wanted."""
    return {name: float((got[name] - t).norm() / t.norm().clamp(min=1e-30)) for name, t in want.items()}


def test_a_layer_follows_the_recipe() -> None:
    """Output and gradients are the oracle's up to float32's rounding; those of exact products are far away."""
    counts = [37, 0, 1, 300]  # more than two tiles of rows; one row alone; no size is a multiple of 128
    case = make_case(counts, gather=False, dim=160, expert_dim=136, dtype=torch.float32)
    got, exact = in_fp8(case, torch.float32), case.run("loop", torch.float64)
    inputs = {name: t.detach().numpy() for name, t in case.inputs.items()} | {"dy": case.upstream_RD.float().numpy()}
    want: dict[str, list[np.ndarray]] = {name: [] for name in exact}
    for e, (n, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        x, s, dy = (inputs[name][end - n : end].astype(np.float64) for name in ("x_ND", "weight_R", "dy"))
        found = fp8_oracle.expert(x, inputs["w13"][e], inputs["w2"][e], s, dy) if n else {}
        for name in ("y", "x_ND", "weight_R"):
            want[name] += [found[name]] if n else []
        for name in ("w13", "w2"):
            want[name].append(found[name] if n else np.zeros_like(inputs[name][e]))
    rows = ("y", "x_ND", "weight_R")
    oracle = {k: torch.tensor(np.concatenate(v) if k in rows else np.stack(v)) for k, v in want.items()}
    assert max(distance(got, oracle).values()) < 1e-3
    assert min(distance(exact, oracle).values()) > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swiglu", "gpt_oss", "relu2"])
def test_a_layer_is_near_exact_products(dtype: torch.dtype, activation: str) -> None:
    """E4M3 rounds by 2.6% of a number on average, root mean square, and a result is the sum of many such errors: of
    either operand, and of a gradient those that came before."""
    case = make_case([33, 0, 64, 7, 140], activation, bias=True, dim=64, expert_dim=48, dtype=torch.bfloat16)
    errors = distance(in_fp8(case, dtype), case.run("loop", torch.float64))
    assert max(errors.values()) < 0.1 and errors["y"] > 0.01
    assert errors["b2"] < 2**-8  # no product


def test_a_whole_layer_sums_its_tokens_rows() -> None:
    inputs, ids_TK = make_layer(T=19, K=3, E=6, D=40, F=24, bias=True, dtype=torch.bfloat16)
    want = run(by_definition, inputs, ids_TK, torch.float64)
    got = run(lambda **t: moe_mlp(fp8=True, **t), inputs, ids_TK, torch.bfloat16)
    assert max(distance(got, want).values()) < 0.1


def test_float32_parameters_under_bf16_rows() -> None:
    """They are quantised as they are; their gradients are float32."""
    case = make_case([33, 0, 7], bias=True, dim=64, expert_dim=32, dtype=torch.bfloat16)
    got, want = case.run("cpu", torch.bfloat16, torch.float32, fp8=True), in_fp8(case, torch.bfloat16)
    assert torch.equal(got["y"], want["y"])
    assert max(distance(got, want).values()) < 2**-8


def test_no_rows() -> None:
    got = in_fp8(make_case([0, 0], bias=True), torch.float32)
    assert got["y"].shape == (0, 16) and not any(t.any() for t in got.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_with_its_expert(bad: float) -> None:
    case = make_case([5, 40, 3], gather=False, dtype=torch.bfloat16)
    case.inputs["x_ND"][20, 3] = bad
    got, want = in_fp8(case, torch.bfloat16), case.run("loop", torch.bfloat16)
    for name in want:
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name


def kept_bytes(T: int, K: int, E: int, D: int, F: int, backend: str) -> int:
    """Bytes of floats that backward keeps of a layer in bf16, beside parameters and routing weights."""
    inputs, ids_TK = make_layer(T, K, E, D, F, dtype=torch.bfloat16)
    leaves = {name: t.bfloat16().requires_grad_() for name, t in inputs.items()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_mlp(ids_TK=ids_TK, backend=backend, fp8=True, **leaves)
    parameters = {t.data_ptr() for t in leaves.values()}
    floats = [t for t in kept.values() if t.is_floating_point() and t.data_ptr() not in parameters]
    return sum(t.numel() * t.element_size() for t in floats if t.shape != (T * K,))


def test_backward_keeps_x_as_its_numbers() -> None:
    """D + 4 ceil(D / 128) bytes of each token instead of 2 D; the pre-activations stay 4 F of each row."""
    T, K, D, F = 40, 2, 160, 32
    assert kept_bytes(T, K, 6, D, F, "cpu") == T * (D + 4 * 2) + 4 * T * K * F


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "complaint"),
    [
        ("loop", "cpu", torch.float32, "expert backend 'loop' has no FP8; use 'auto', 'cpu' or 'triton'"),
        ("grouped_mm", "cuda", torch.bfloat16, "expert backend 'grouped_mm' has no FP8"),
        ("auto", "cpu", torch.float64, "take bfloat16, float16 or float32, not float64"),
        ("cpu", "cuda", torch.bfloat16, "'cpu' cannot run on cuda"),
        ("auto", "mps", torch.bfloat16, "experts in FP8 cannot run in Triton: (triton is not|.* do not run on mps)"),
    ],
)
def test_what_has_no_fp8_is_refused(backend: str, device: str, dtype: torch.dtype, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        choose_backend(backend, device, dtype, 64, 64, fp8=True)
    assert "\n" not in str(error.value)


def test_ampere_has_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same GPU runs the other kernels."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_backend("triton", "cuda", torch.bfloat16, 64, 64)[0] == "triton"
        if capability == (9, 0):
            assert choose_backend("auto", "cuda", torch.bfloat16, 64, 64, fp8=True)[0] == "triton"
        else:
            with pytest.raises(ValueError, match="FP8 needs a GPU of compute capability 9"):
                choose_backend("auto", "cuda", torch.bfloat16, 64, 64, fp8=True)


def test_the_same_bits_again() -> None:
    case = make_case([50, 0, 31, 190], dim=64, expert_dim=32, dtype=torch.bfloat16)
    first, again = in_fp8(case, torch.bfloat16), in_fp8(case, torch.bfloat16)
    assert all(torch.equal(first[name], again[name]) for name in first)
