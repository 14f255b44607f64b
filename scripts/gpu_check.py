"""Checks the Triton kernels against their reference on a GPU, then times them: ``python scripts/gpu_check.py``.

Needs torch, triton and the folder kernels/ beside this one's, nothing else. Shapes are SonicMoE's (arXiv 2512.14080).
For each: forward and backward of a whole layer (``moe_mlp``) through "triton" and "grouped_mm", beside one dense cuBLAS
product of as many operations; peak memory of a step above its inputs; and time by kernel. Much of the time goes into
compiling and tuning, which triton keeps on disk. No shape is begun in the last of --minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from gpu_ops import op_checks, time_ops
from moe_kernels import ACTIVATIONS, expert_mlp, moe_mlp


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


def normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, device=device, dtype=torch.float32) * scale


def weights(device: str, E: int, matrices: int, D: int, F: int) -> dict[str, Tensor]:
    w13 = normal(device, E, matrices, F, D, scale=D**-0.5)
    return {"w13": w13, "w2": normal(device, E, D, F, scale=F**-0.5)}


def run(inputs: dict[str, Tensor], dtype: torch.dtype, call: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The output and every gradient, in float64."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
    y = call(**leaves)
    upstream = torch.arange(1.0, y.numel() + 1, device=y.device, dtype=torch.float64).cos().view_as(y).to(dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {name: t.double() for name, t in zip(("out", *leaves), (y.detach(), *grads), strict=True)}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest error of a tensor, relative to its norm; 1 where something is NaN or infinite."""
    errors = [((got[name] - t).norm() / t.norm().clamp(min=1e-30)).item() for name, t in want.items()]
    return max(error if error < 1 else 1.0 for error in errors)


def checks(device: str, D: int, F: int) -> list[dict[str, Any]]:
    """Every activation, some with biases; uneven and empty experts; sizes that are no multiple of a tile."""
    cases = [(torch.bfloat16, activation) for activation in ACTIVATIONS]
    cases += [(torch.float16, "swiglu"), (torch.float32, "swiglu")]
    return [check_experts(device, D, F, *case) for case in cases]


def check_experts(device: str, D: int, F: int, dtype: torch.dtype, activation: str) -> dict[str, Any]:
    counts = [D + 3, 0, 5, 2 * D]
    e, R, matrices = len(counts), sum(counts), ACTIVATIONS[activation].matrices
    inputs = {"x_ND": normal(device, R // 2, D), "weight_R": normal(device, R).sigmoid()}
    inputs |= weights(device, e, matrices, D, F)
    if activation in ("gpt_oss", "relu2"):
        inputs |= {"b13": normal(device, e, matrices, F), "b2": normal(device, e, D)}
    inputs = {name: t.to(dtype).double() for name, t in inputs.items()}
    index_R = torch.arange(R, device=device) * 7 % (R // 2)
    call = functools.partial(expert_mlp, index_R=index_R, activation=activation)
    want = run(inputs, torch.float64, functools.partial(call, counts=counts, backend="loop"))
    counts_e = torch.tensor(counts, device=device)
    got = run(inputs, dtype, functools.partial(call, counts=counts_e, backend="triton"))
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    return _row(f"{activation} {str(dtype)[6:]}", worst(got, want), limit)


def check_layer(device: str, shape: Shape) -> list[dict[str, Any]]:
    """A whole layer against the loop; then compiled, and captured in a graph and replayed with another routing."""
    inputs, ids_TK = layer_inputs(device, shape)
    want = run(inputs, torch.float64, lambda **t: moe_mlp(ids_TK=ids_TK, backend="loop", **t))
    got = run(inputs, torch.bfloat16, lambda **t: moe_mlp(ids_TK=ids_TK, backend="triton", **t))
    rows = [_row("layer bfloat16", worst(got, want), 2e-2)]
    if device == "cuda":
        layer = torch.compile(lambda **t: moe_mlp(ids_TK=ids_TK, backend="triton", **t), fullgraph=True)
        rows.append(_row("layer under torch.compile", worst(run(inputs, torch.bfloat16, layer), got), 1e-2))
        half = {name: t.bfloat16() for name, t in inputs.items()}
        buffer, graph = ids_TK.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moe_mlp(ids_TK=buffer, backend="triton", **half)
        buffer.copy_(ids_TK.flip(0))
        graph.replay()
        again = moe_mlp(ids_TK=buffer, backend="triton", **half)
        rows.append(_row("layer in a CUDA graph", float(not torch.equal(out, again)), 0.0))
    return rows


def check_fp8(device: str, shape: Shape) -> dict[str, Any]:
    """A layer in FP8 against its emulation on the CPU. Tensor cores keep about 14 bits of a sum, so some numbers become
    the E4M3 number beside theirs; FP8 itself is about 6e-2 from float64."""
    inputs, ids_TK = layer_inputs(device, shape)
    got = run(inputs, torch.bfloat16, lambda **t: moe_mlp(ids_TK=ids_TK, backend="triton", fp8=True, **t))
    host = {name: t.cpu() for name, t in inputs.items()}
    want = run(host, torch.bfloat16, lambda **t: moe_mlp(ids_TK=ids_TK.cpu(), backend="cpu", fp8=True, **t))
    return _row("layer in FP8", worst({name: t.cpu() for name, t in got.items()}, want), 3e-2)


def check_ops(device: str) -> list[dict[str, Any]]:
    """The ops beside the expert layer (``gpu_ops.py``)."""
    return [_row(name, error(), limit) for name, limit, error in op_checks(device)]


def _row(name: str, error: float, limit: float) -> dict[str, Any]:
    print(f"{'ok  ' if error <= limit else 'FAIL'} {name}: error {error:.1e}, limit {limit:.0e}", flush=True)
    return {"check": name, "error": error, "limit": limit, "ok": error <= limit}


def layer_inputs(device: str, s: Shape) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs of ``moe_mlp`` but ids, ids_TK of a random router)."""
    inputs = {"x_TD": normal(device, s.T, s.D), "weights_TK": normal(device, s.T, s.K).sigmoid()}
    inputs |= weights(device, s.E, 2, s.D, s.F)
    return inputs, normal(device, s.T, s.E).topk(s.K).indices


def seconds(call: Callable[[], object], repeat: int = 10) -> float:
    """Median time of a call on the GPU, after three to warm up and tune; the L2 cache is overwritten before each."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeat):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure(s: Shape) -> list[dict[str, Any]]:
    """Rows of one shape, one for each backend and pass."""
    dense = dense_rate(s)
    print(f"\n{s}: cuBLAS {dense:.0f} TFLOP/s", flush=True)
    wide, ids_TK = layer_inputs("cuda", s)
    inputs = {name: t.bfloat16().requires_grad_() for name, t in wide.items()}
    del wide
    rows = []
    for backend in ("triton", "grouped_mm"):
        try:
            rows += measure_backend(s, inputs, ids_TK, backend, dense)
        except torch.OutOfMemoryError:
            rows.append(s._asdict() | {"backend": backend, "error": "out of memory"})
            print(f"  {backend}: out of memory")
    return rows


def dense_rate(s: Shape) -> float:
    """TFLOP/s of one cuBLAS product with a forward pass's operations: as many rows, through one matrix (3 F, D)."""
    a, b = normal("cuda", s.T * s.K, s.D).bfloat16(), normal("cuda", 3 * s.F, s.D).bfloat16()
    return s.flops / seconds(functools.partial(torch.mm, a, b.t())) / 1e12


def measure_backend(
    s: Shape, inputs: dict[str, Tensor], ids_TK: Tensor, backend: str, dense: float
) -> list[dict[str, Any]]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward = functools.partial(moe_mlp, ids_TK=ids_TK, backend=backend, **inputs)  # type: ignore[arg-type]
    out = forward()
    leaves, above = list(inputs.values()), torch.ones_like(out)
    backward = functools.partial(torch.autograd.grad, out, leaves, above, retain_graph=True)
    backward()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    rows = []
    for name, call, flops in (("forward", forward, s.flops), ("backward", backward, 2 * s.flops)):
        took = seconds(call)
        rate = flops / took / 1e12
        rows.append(s._asdict() | {"backend": backend, "pass": name, "seconds": took, "TFLOP/s": rate})
        rows[-1] |= {"cuBLAS TFLOP/s": dense, "of cuBLAS": rate / dense, "peak GiB": peak}
        share = f"{rate:6.0f} TFLOP/s {rate / dense:5.0%} of cuBLAS"
        print(f"  {backend:10} {name:8} {took * 1e3:8.3f} ms {share}  peak {peak:.2f} GiB", flush=True)
        if backend == "triton":
            rows[-1]["kernels"] = by_kernel(call)
    return rows


def by_kernel(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel in a call; what tuning chose last is printed beside them."""
    from moe_kernels.gpu import products

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = {event.key[:60]: event.device_time_total / 1e3 for event in profile.key_averages()}
    for name, took in sorted(found.items(), key=lambda item: -item[1])[:12]:
        print(f"    {took:8.3f} ms  {name}")
    tuned = (products.up_projection, products.rows_times_weights, products.down_gradient, products.weight_gradient)
    for kernel in tuned:
        print(f"    {kernel.base_fn.__name__}: {getattr(kernel, 'best_config', None)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all rows there, after each shape")
    parser.add_argument("--minutes", type=float, default=9, help="the time that there is")
    parser.add_argument("--checks-only", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no GPU here; it needs one of compute capability 8.0 or later")
    end = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shapes": []}

    def save() -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1))

    result["checks"] = checks("cuda", 136, 72) + check_layer("cuda", Shape("check", 500, 256, 128, 9, 4))
    if torch.cuda.get_device_capability() >= (9, 0):
        result["checks"].append(check_fp8("cuda", Shape("check", 600, 272, 144, 5, 2)))
    result["checks"] += check_ops("cuda")
    save()
    if not args.checks_only:
        result["ops"] = time_ops()
        for shape in SHAPES:
            if time.monotonic() > end - 60:
                break
            result["shapes"] += measure(shape)
            save()
            torch.cuda.empty_cache()
    failed = [row["check"] for row in result["checks"] if not row["ok"]]
    if failed:
        sys.exit(f"gpu_check: {len(failed)} of {len(result['checks'])} checks failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
