"""The compiled CPU path: used where there is a compiler; all else goes through torch's operations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_kernels import expert_mlp, linear, linear_cross_entropy, rms_norm, rope
from moe_kernels.native import dense, library
from moe_kernels.native.attention import native_attention
from moe_kernels.native.experts import rows_times_weights
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from tests.kernels.expert_cases import make_case, refused_twice

needs_compiler = pytest.mark.skipif(
    library.native_obstacle(torch.float32) is not None, reason="no compiler, or a processor without oneDNN's kernels"
)


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 without units"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The last as on a processor that has no products of bfloat16."""
    without = library.widens_halves()
    library.widen_halves(request.param == "bfloat16 without units")
    if request.param == "bfloat16" and library.widens_halves():
        pytest.skip("this processor has no products of bfloat16")
    yield torch.float32 if request.param == "float32" else torch.bfloat16
    library.widen_halves(without)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- the build ------------------------------------------------------------------------------------------------------


RUN = """
import logging, torch
logging.basicConfig(format="%(message)s")
from moe_kernels import expert_mlp
g = torch.Generator().manual_seed(0)
x, w13, w2 = (torch.randn(*shape, generator=g) for shape in ((9, 8), (2, 2, 6, 8), (2, 8, 6)))
print([expert_mlp(x, [4, 5], w13, w2, backend=b).double().sum().item() for b in ("cpu", "cpu", "loop")])
"""


@needs_compiler
def test_it_is_built_once_and_kept(tmp_path: Path) -> None:
    def in_fresh_process() -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True, check=False)

    first = in_fresh_process()
    assert first.returncode == 0 and first.stderr == "", first.stderr
    (built,) = (tmp_path / "moe_kernels").glob("*.so")
    stamp = built.stat().st_mtime_ns
    assert in_fresh_process().stdout == first.stdout
    assert [p.stat().st_mtime_ns for p in (tmp_path / "moe_kernels").glob("*.so")] == [stamp]


def test_ranks_that_start_together_build_it_once_between_them(tmp_path: Path) -> None:
    """All of a machine would take as many times as long, and as much more memory."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho built >> {tmp_path}/log\nsleep 1\nfor out; do :; done\ntouch $out\n")
    compiler.chmod(0o755)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    build = "from moe_kernels.native import library; print(library._built())"
    ranks = [subprocess.Popen([sys.executable, "-c", build], env=env, stdout=subprocess.PIPE) for _ in range(4)]
    assert len({rank.communicate()[0] for rank in ranks}) == 1 and not any(rank.returncode for rank in ranks)
    assert (tmp_path / "log").read_text() == "built\n"


@pytest.fixture
def asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not looked for the compiled kernels, of a user who has none; afterwards once more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    yield
    library._load.cache_clear()


def sums() -> list[float]:
    """Of what the experts of two calls on the CPU give, and of what the loop gives."""
    case = make_case([4, 5], dim=8, expert_dim=6)
    return [case.run(backend, torch.float32)["y"].sum().item() for backend in ("cpu", "cpu", "loop")]


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, "no C++ compiler was found"),
        ({"CXX": "false"}, "/false ended with status 1: it says nothing"),  # a compiler that fails
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "No such file or directory"),
        ({"MOE_KERNELS_NATIVE": "0"}, ""),
    ],
    ids=["none", "broken", "no folder", "forbidden"],
)
def test_without_it_experts_run_all_the_same(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cpu, again, loop = sums()
    assert cpu == again == pytest.approx(loop, rel=1e-5)
    assert len(caplog.messages) == (1 if said else 0) and said in caplog.text and "\n" not in "".join(caplog.messages)


@needs_compiler
@pytest.mark.usefixtures("asked_anew")
def test_a_user_without_a_home_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in containers, where a user may be a number alone."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    cpu, again, loop = sums()
    assert cpu == again == pytest.approx(loop, rel=1e-5)
    [message] = caplog.messages
    assert "there is no home folder to keep them in; set XDG_CACHE_HOME" in message and "\n" not in message


def test_what_it_lacks_is_said() -> None:
    assert library.native_obstacle(torch.float64) == "it has no float64"


# ---- experts -------------------------------------------------------------------------------------------------------


@needs_compiler
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 200), min_size=1, max_size=5), dim=st.integers(1, 90), width=st.integers(1, 90))
def test_any_sizes(dtype: torch.dtype, counts: list[int], dim: int, width: int) -> None:
    """Odd sizes, and none that fills a tile; against the loop in float64."""
    case = make_case(counts, bias=True, dim=dim, expert_dim=width, dtype=dtype)
    got, want = case.run("cpu", dtype), case.run("loop", torch.float64)
    limit, least = 1e-5 if dtype == torch.float32 else 0.02, max(sum(counts), 1) ** 0.5
    for name in want:  # sums over rows may cancel: then beside a sum of so many numbers of size 1
        assert (got[name] - want[name]).norm() <= limit * want[name].norm().clamp(min=least), name


@needs_compiler
@pytest.mark.parametrize("counts", [[700, 0, 30, 5], [0, 0, 900, 0]], ids=["uneven", "all to one"])
@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit(dtype: torch.dtype, counts: list[int]) -> None:
    """Work is cut differently for one, two and five threads; every sum keeps its order."""
    case = make_case(counts, bias=True, dim=160, expert_dim=200, tokens=400, dtype=dtype)
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(case.run("cpu", dtype))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@needs_compiler
def test_large_results_that_are_written_past_the_cache(dtype: torch.dtype) -> None:
    """The pre-activation has more than 8 MB, and so have the activation and dh."""
    case = make_case([9000, 0, 6400], dim=32, expert_dim=288, tokens=500, dtype=dtype)
    got, want = case.run("cpu", dtype), case.run("loop", torch.float64)
    for name in want:
        assert (got[name] - want[name]).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * want[name].norm(), name


@needs_compiler
def test_only_memory_of_the_cpu_is_read() -> None:
    """A pointer into a GPU, or that of a tensor that wraps others, would end the process."""
    x = torch.ones(4, 8)
    pair = TwoTensor(x, x)
    with pytest.raises(RuntimeError, match=r"take plain tensors on the CPU .*, not a TwoTensor on cpu"):
        rows_times_weights(pair, None, torch.ones(1, 8, 8), torch.tensor([4]), True, out=torch.empty(4, 8))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="a FakeTensor on cuda"):
        w = torch.ones(1, 8, 8, device="cuda")
        rows_times_weights(x, None, w, torch.tensor([4]), True, out=torch.empty(4, 8))


@needs_compiler
@pytest.mark.parametrize("index", [-1, 24])
def test_rows_that_are_not_there_are_refused(index: int) -> None:
    x, w13, w2 = torch.zeros(24, 8), torch.zeros(2, 2, 4, 8), torch.zeros(2, 8, 4)
    with pytest.raises(IndexError, match="but x has 24 rows"):
        expert_mlp(x, [2, 1], w13, w2, index_R=torch.tensor([0, 3, index]))


# ---- dense layers and the loss --------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 1500, 70), (300, 96, 130), (1100, 8, 40)])
@pytest.mark.usefixtures("threads")
def test_dense_products(dtype: torch.dtype, rows: int, inner: int, outer: int) -> None:
    """All three of a dense layer, more rows and a larger inner dimension than one block; against float64, and the same
    bits from one and from three threads. The weight's gradient is float32, and can be added to one that is there."""
    g = torch.Generator().manual_seed(rows)
    x, w, dy = (torch.randn(*shape, generator=g).to(dtype) for shape in ((rows, inner), (outer, inner), (rows, outer)))
    bias, before = torch.randn(outer, generator=g).to(dtype), torch.randn(outer, inner, generator=g)
    results = []
    for n in (1, 3):
        torch.set_num_threads(n)
        added = dense.transposed_times(dy, x, before.clone(), add=True)
        results.append((dense.times_transposed(x, w, bias), dense.times(dy, w), added))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    x64, w64, dy64 = x.double(), w.double(), dy.double()
    want = x64 @ w64.T + bias.double(), dy64 @ w64, dy64.T @ x64 + before.double()
    limits = (1e-6,) * 3 if dtype == torch.float32 else (3e-3, 3e-3, 1e-6)
    for got, exact, limit in zip(results[0], want, limits, strict=True):
        assert (got.double() - exact).norm() < limit * exact.norm()


@needs_compiler
def test_weights_are_rounded_whatever_the_processor_has() -> None:
    """Float32 weights under bfloat16 rows: without units for bfloat16 the same rounded numbers are multiplied."""
    x, w = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64)
    x[:, 1::2] = -1
    w.fill_diagonal_(1.0 + 2.0**-12)  # 1 in bfloat16
    without = library.widens_halves()
    library.widen_halves(True)
    try:
        products = dense.times_transposed(x, w), dense.times(x, w)
    finally:
        library.widen_halves(without)
    for y in products:
        assert (y == 0).all()


@needs_compiler
def test_a_linear_layer_in_bfloat16_avoids_torchs_slow_products() -> None:
    """Where the processor has no units for them; elsewhere torch's are fast."""
    g = torch.Generator().manual_seed(0)
    x, w, above = (torch.randn(*shape, generator=g).bfloat16() for shape in ((64, 40), (72, 40), (64, 72)))
    mine, exact = ([t.to(d).requires_grad_() for t in (x, w)] for d in (torch.bfloat16, torch.float64))
    without = library.widens_halves()
    library.widen_halves(True)
    try:
        y = linear(*mine)
        grads = torch.autograd.grad(y, mine, above)
    finally:
        library.widen_halves(without)
    assert "_Linear" in repr(y._base.grad_fn if y._base is not None else y.grad_fn)
    want = F.linear(*exact)
    for a, b in zip((y, *grads), (want, *torch.autograd.grad(want, exact, above.double())), strict=True):
        assert (a.double() - b).norm() < 4e-3 * b.norm()


@needs_compiler
def test_a_large_linear_layer_is_torchs_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through ``moe_kernels.linear``: values, gradients, a shape with two leading dimensions, a bias."""
    monkeypatch.setattr("moe_kernels.native.dense.SMALL", 0)
    g = torch.Generator().manual_seed(0)
    mine = [torch.randn(*shape, generator=g).requires_grad_() for shape in ((3, 50, 40), (72, 40), (72,))]
    exact = [t.detach().double().requires_grad_() for t in mine]
    got, want = linear(*mine), F.linear(*exact)
    above = torch.randn(3, 50, 72, generator=g)
    assert "_Linear" in repr(got._base.grad_fn if got._base is not None else got.grad_fn)
    grads, wanted = torch.autograd.grad(got, mine, above), torch.autograd.grad(want, exact, above.double())
    for a, b in zip((got, *grads), (want, *wanted), strict=True):
        assert (a.double() - b).norm() < 1e-6 * b.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*mine).dtype == torch.bfloat16  # as a small one, which is torch's


@needs_compiler
@pytest.mark.parametrize("chunk", [64, 100])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str, chunk: int) -> None:
    """The compiled softmax, of a vocabulary that fills no vector, against torch's cross-entropy in float64."""
    monkeypatch.setattr("moe_kernels.native.dense.SMALL", 0)
    g = torch.Generator().manual_seed(chunk)
    mine = [torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((200, 24), (301, 24))]
    targets = torch.randint(301, (200,), generator=g).index_fill(0, torch.tensor([0, 150]), -100)
    exact = [t.detach().double().requires_grad_() for t in mine]
    got = linear_cross_entropy(*mine, targets, reduction=reduction, chunk=chunk)
    want = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction=reduction)
    above = torch.rand(got.shape, generator=g) + 0.5
    grads, wanted = torch.autograd.grad(got, mine, above), torch.autograd.grad(want, exact, above.double())
    for a, b in zip((got, *grads), (want, *wanted), strict=True):
        assert (a.double() - b).norm() < (2e-6 if dtype == torch.float32 else 1e-2) * b.norm()


# ---- norms and positions --------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1), (600, 40), (513, 300)], ids=str)
@pytest.mark.usefixtures("threads")
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Widths that fill no vector and rows of several stages, with an offset, against the formula in float64; the same
    bits from one and from three threads."""
    g = torch.Generator().manual_seed(shape[0])
    x, weight, above = (torch.randn(*s, generator=g).to(dtype) for s in (shape, shape[1:], shape))
    mine, exact = ([t.to(d).requires_grad_() for t in (x, weight)] for d in (dtype, torch.float64))
    results = []
    for n in (1, 3):
        torch.set_num_threads(n)
        y = rms_norm(*mine, 1e-6, offset=1.0)
        results.append((y, *torch.autograd.grad(y, mine, above)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    x64, weight64 = exact
    want = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (weight64 + 1)
    for a, b in zip(results[0], (want, *torch.autograd.grad(want, exact, above.double())), strict=True):
        assert (a.double() - b).norm() <= (2e-6 if dtype == torch.float32 else 4e-3) * b.norm() + 1e-6


@needs_compiler
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_rope(dtype: torch.dtype, per_sequence: bool, interleaved: bool) -> None:
    """A head of 21 of which 10 turn, against torch's operators in float64, forward and backward."""
    g = torch.Generator().manual_seed(0)
    angle = torch.randn(*(3, 7)[not per_sequence :], 1, 5, generator=g)
    x, above = (torch.randn(3, 7, 2, 21, generator=g).to(dtype) for _ in range(2))
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    got = rope(mine, *tables, interleaved=interleaved)
    want = rope(exact, *(t.double() for t in tables), interleaved=interleaved)
    (dx,), (dx64,) = torch.autograd.grad(got, mine, above), torch.autograd.grad(want, exact, above.double())
    for a, b in ((got, want), (dx, dx64)):
        assert (a.double() - b).abs().max() < (1e-6 if dtype == torch.float32 else 4e-3) * b.abs().max()


# ---- attention -----------------------------------------------------------------------------------------------------


def reference(q: Tensor, k: Tensor, v: Tensor, first_BS: Tensor, scale: float) -> Tensor:
    at = torch.arange(q.shape[1])
    mask = (at[None, None] <= at[None, :, None]) & (at[None, None] >= first_BS[:, :, None])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def first_keys(kind: str, B: int, S: int) -> Tensor:
    at = torch.arange(S).expand(B, S)
    if kind == "documents":  # of 1, 2, 3, ... tokens, other ones in every sequence
        start = torch.arange(S).cumsum(0) - torch.arange(B)[:, None]
        return ((at[:, :, None] >= start[:, None]) * start[:, None]).amax(-1).clamp(min=0)
    return (at - 36).clamp(min=0) if kind == "window" else torch.zeros_like(at)


@needs_compiler
@pytest.mark.parametrize("kind", ["causal", "documents", "window"])
@pytest.mark.parametrize(
    ("B", "S", "H", "G", "d", "w"),
    [
        (2, 130, 4, 2, 16, 16),
        (1, 64, 2, 2, 24, 16),
        (2, 200, 4, 1, 40, 80),
        (2, 37, 2, 1, 7, 5),
        (1, 300, 2, 1, 192, 128),
    ],
)
def test_attention(kind: str, dtype: torch.dtype, B: int, S: int, H: int, G: int, d: int, w: int) -> None:
    """Values and gradients against torch's attention under the same mask, in float64; float32 within its rounding."""
    g = torch.Generator().manual_seed(S)
    shapes = ((H, d), (G, d), (G, w), (H, w))
    q, k, v, above = (torch.randn(B, S, *shape, generator=g).to(dtype) for shape in shapes)
    first_BS = first_keys(kind, B, S)
    mine = [t.clone().requires_grad_() for t in (q, k, v)]
    out = native_attention(*mine, first_BS, d**-0.5)
    got = (out, *torch.autograd.grad(out, mine, above))
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    want_out = reference(*exact, first_BS, d**-0.5)
    want = (want_out, *torch.autograd.grad(want_out, exact, above.double()))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert (a.double() - b).norm() < (1e-6 if dtype == torch.float32 else 0.01) * b.norm(), name


@needs_compiler
@pytest.mark.usefixtures("threads")
def test_attention_does_not_depend_on_threads() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 500, n, 32, generator=g).requires_grad_() for n in (4, 2, 2))
    results = []
    for n in (1, 2, 7):
        torch.set_num_threads(n)
        out = native_attention(q, k, v, torch.zeros(1, 500, dtype=torch.int64), 0.2)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_nan_stays_with_the_queries_that_see_it() -> None:
    q, k, v = (torch.zeros(1, 200, 1, 8) for _ in range(3))
    k[0, 70] = float("nan")
    out = native_attention(q, k, v, torch.zeros(1, 200, dtype=torch.int64), 1.0)
    assert out[0, :70].isfinite().all() and out[0, 70:].isnan().all()


@needs_compiler
def test_a_second_derivative_of_attention_is_refused() -> None:
    q, k, v = (torch.randn(1, 5, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    first_BS = torch.zeros(1, 5, dtype=torch.int64)
    refused_twice(lambda q: native_attention(q, k, v, first_BS, 0.5), q)
