"""Times of expert layers for ``gpu_check.py``: every backend that runs here, at SonicMoE's shapes; and token rounding.

For each shape: forward and backward of a whole layer (``moe_mlp``) beside one dense product of as many operations
(cuBLAS on a GPU), peak memory of a step above its inputs, and the ratios to "grouped_mm" and "scattermoe".
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from moe_kernels import BACKENDS, choose_backend, expert_mlp, moe_mlp, round_tokens
from torch import Tensor

PEERS = ("grouped_mm", "scattermoe")
SLEEP = 10_000_000  # cycles of the GPU, some 6 ms


class Shape(NamedTuple):
    """T tokens of width D; E experts of width F, of which each token takes K."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def flops(self) -> int:
        """Of a forward pass; backward has twice as many."""
        return 6 * self.T * self.K * self.F * self.D


# The most telling first: time may end.
SHAPES = [
    Shape("7B", 24576, 1536, 256, 128, 8),
    Shape("30B", 32768, 4096, 512, 128, 8),
    Shape("1.4B", 40960, 768, 512, 64, 4),
    Shape("120B", 32768, 4096, 1024, 128, 8),
    Shape("7B", 24576, 1536, 1024, 32, 2),
    Shape("7B", 24576, 1536, 512, 64, 4),
    Shape("30B", 32768, 4096, 256, 256, 16),
    Shape("30B", 32768, 4096, 1024, 64, 4),
    Shape("1.4B", 40960, 768, 256, 128, 8),
    Shape("1.4B", 40960, 768, 1024, 32, 2),
    Shape("120B", 32768, 4096, 512, 256, 16),
    Shape("120B", 32768, 4096, 2048, 64, 4),
]
# Sparse ones for token rounding. The paper's gains there, forward + backward: 9.4%, 15.9%, and for the last 19.6%
# forward and 7.9% backward.
ROUNDED = [
    Shape("2 of 128", 16384, 1536, 1024, 128, 2),
    Shape("4 of 256", 16384, 4096, 1024, 256, 4),
    Shape("10 of 512", 16384, 2048, 512, 512, 10),
]
TINY = Shape("tiny", 96, 32, 16, 8, 2)


def normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, device=device, dtype=torch.float32) * scale


def weights(device: str, E: int, matrices: int, D: int, F: int) -> dict[str, Tensor]:
    w13 = normal(device, E, matrices, F, D, scale=D**-0.5)
    return {"w13": w13, "w2": normal(device, E, D, F, scale=F**-0.5)}


def layer_inputs(device: str, s: Shape) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs of ``moe_mlp`` but ids, ids_TK of a random router)."""
    inputs = {"x_TD": normal(device, s.T, s.D), "weights_TK": normal(device, s.T, s.K).sigmoid()}
    inputs |= weights(device, s.E, 2, s.D, s.F)
    return inputs, normal(device, s.T, s.E).topk(s.K).indices


def obstacles(device: str, dim: int, expert_dim: int) -> dict[str, str | None]:
    """Why each backend cannot run in bfloat16 here; None where it can. Without "loop", the oracle."""
    found: dict[str, str | None] = {}
    for name in BACKENDS:
        if name not in ("auto", "fastest", "loop"):
            try:
                found[name] = None
                choose_backend(name, device, torch.bfloat16, dim, expert_dim)
            except ValueError as error:
                found[name] = str(error)
    return found


def runnable(device: str, dim: int, expert_dim: int) -> list[str]:
    """The backends that can run in bfloat16 here."""
    return [name for name, why in obstacles(device, dim, expert_dim).items() if why is None]


def seconds(call: Callable[..., object], device: str, before: Callable[[], object] | None = None) -> float:
    """Median time of a call; on a GPU after three that warm up and tune, the L2 cache being overwritten before each.

    A GPU sleeps while the call is being queued, as it is busy with earlier work in training: else short kernels would
    be timed by how long Python takes to launch them. A call that waits for the GPU loses that.
    before: called each time before the clock starts; ``call`` gets what it gives.
    """
    gpu = device == "cuda"
    flush = torch.empty(2**28 if gpu else 0, dtype=torch.uint8, device=device)
    times = []
    for _ in range(13 if gpu else 4):
        given = () if before is None else (before(),)
        flush.zero_()
        if gpu:
            torch.cuda._sleep(SLEEP)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(*given)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call(*given)
            times.append(time.perf_counter() - began)
    return statistics.median(times[3 if gpu else 1 :])


def pass_times(forward: Callable[[], Tensor], leaves: list[Tensor], device: str) -> list[float]:
    """Seconds of ``forward``, and of its backward in ``leaves``, each time of a fresh graph."""
    above = torch.ones_like(forward())
    backward = lambda out: torch.autograd.grad(out, leaves, above)  # noqa: E731
    return [seconds(forward, device), seconds(backward, device, forward)]


def measure(s: Shape, device: str) -> list[dict[str, Any]]:
    """Rows of one shape, one for each backend and pass. A backend that fails costs its rows only."""
    dense = dense_rate(s, device)
    print(f"\n{s}: one dense product {dense:.3g} TFLOP/s", flush=True)
    wide, ids_TK = layer_inputs(device, s)
    inputs = {name: t.bfloat16().requires_grad_() for name, t in wide.items()}
    del wide
    rows: list[dict[str, Any]] = []
    for backend in runnable(device, s.D, s.F):
        try:
            rows += measure_backend(s, inputs, ids_TK, backend, dense)
        except Exception as error:  # a package's kernel may raise anything
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            rows.append(s._asdict() | {"backend": backend, "error": why})
            print(f"  {backend}: {why}", flush=True)
    compare(rows)
    return rows


def dense_rate(s: Shape, device: str) -> float:
    """TFLOP/s of one dense product with a forward pass's operations: as many rows, through one matrix (3 F, D)."""
    a, b = normal(device, s.T * s.K, s.D).bfloat16(), normal(device, 3 * s.F, s.D).bfloat16()
    return s.flops / seconds(functools.partial(torch.mm, a, b.t()), device) / 1e12


def measure_backend(
    s: Shape, inputs: dict[str, Tensor], ids_TK: Tensor, backend: str, dense: float
) -> list[dict[str, Any]]:
    device = ids_TK.device.type
    gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    forward = functools.partial(moe_mlp, ids_TK=ids_TK, backend=backend, **inputs)  # type: ignore[arg-type]
    out, leaves = forward(), list(inputs.values())
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if gpu else None
    rows = []
    for name, took, flops in zip(
        ("forward", "backward"), pass_times(forward, leaves, device), (s.flops, 2 * s.flops), strict=True
    ):
        rate = flops / took / 1e12
        rows.append(s._asdict() | {"backend": backend, "pass": name, "seconds": took, "TFLOP/s": rate})
        rows[-1] |= {"dense TFLOP/s": dense, "of dense": rate / dense, "peak GiB": peak}
        share = f"{rate:7.4g} TFLOP/s {rate / dense:5.0%} of dense"
        memory = "" if peak is None else f"  peak {peak:.2f} GiB"
        print(f"  {backend:12} {name:8} {took * 1e3:9.3f} ms {share}{memory}", flush=True)
        if backend == "triton" and gpu:
            rows[-1]["kernels"] = by_kernel(forward, leaves if name == "backward" else None)
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Print how many times faster than each peer every backend is, forward and backward."""
    took = {(row["backend"], row["pass"]): row["seconds"] for row in rows if "error" not in row}
    for peer in PEERS:
        if (peer, "forward") not in took:
            continue
        for backend in dict.fromkeys(name for name, _ in took if name != peer):
            ratios = [f"{p} x{took[peer, p] / took[backend, p]:.2f}" for p in ("forward", "backward")]
            print(f"  {backend} over {peer}: {', '.join(ratios)}")


def by_kernel(forward: Callable[[], Tensor], leaves: list[Tensor] | None) -> dict[str, float]:
    """Milliseconds of each kernel of a pass, which is backward where there are leaves; what tuning chose last is
    printed beside them."""
    from moe_kernels.gpu import products

    out = None if leaves is None else forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        if leaves is None or out is None:
            forward()
        else:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.cuda.synchronize()
    found = {event.key[:60]: event.device_time_total / 1e3 for event in profile.key_averages()}
    for name, took in sorted(found.items(), key=lambda item: -item[1])[:12]:
        print(f"    {took:8.3f} ms  {name}")
    tuned = (products.up_projection, products.rows_times_weights, products.down_gradient, products.weight_gradient)
    for kernel in tuned:
        print(f"    {kernel.base_fn.__name__}: {getattr(kernel, 'best_config', None)}")
    return found


def measure_rounding(s: Shape, device: str, tile: int = 128) -> list[dict[str, Any]]:
    """Experts after top-k and after token rounding: TFLOP/s of the rows that each has, without the router."""
    wide, ids_TK = layer_inputs(device, s)
    scores_TE = normal(device, s.T, s.E).sigmoid()
    weights_TK = scores_TE.gather(1, ids_TK)
    del wide["weights_TK"]
    order_A = ids_TK.flatten().argsort(stable=True)
    top_k = order_A // s.K, ids_TK.flatten()[order_A], weights_TK.flatten()[order_A]
    token_A, expert_A, weight_A = round_tokens(scores_TE, ids_TK, weights_TK, tile)
    order_A = expert_A.argsort(stable=True)
    rounded = token_A[order_A], expert_A[order_A], weight_A[order_A]
    inputs = {"x_ND" if name == "x_TD" else name: t.bfloat16().requires_grad_() for name, t in wide.items()}
    del wide, scores_TE
    rows: list[dict[str, Any]] = []
    print(f"\ntoken rounding, {s}", flush=True)
    for backend in [name for name in runnable(device, s.D, s.F) if name in ("triton", "cpu", *PEERS)]:
        rates = {}
        for kind, (token_R, expert_R, weight_R) in (("top-k", top_k), ("rounded", rounded)):
            counts = expert_R.bincount(minlength=s.E).tolist()
            more = {"counts": counts, "index_R": token_R, "weight_R": weight_R.bfloat16().requires_grad_()}
            forward = functools.partial(expert_mlp, backend=backend, **inputs, **more)
            took = pass_times(forward, [*inputs.values(), more["weight_R"]], device)
            work = 6 * sum(counts) * s.F * s.D / 1e12
            rates[kind] = work / took[0], 2 * work / took[1], 3 * work / sum(took)
            row = {"backend": backend, "rows": kind, "count": sum(counts), "seconds": took, "TFLOP/s": rates[kind]}
            rows.append(s._asdict() | row)
        gains = [f"{b / a - 1:+.1%}" for a, b in zip(rates["top-k"], rates["rounded"], strict=True)]
        print(f"  {backend:12} forward, backward, both: {', '.join(gains)}", flush=True)
    return rows
