"""Rate of the experts on CPU as a share of one dense product's: moe_kernels' paths and torch's grouped_mm.

product: y_r = W_e x_r for rows grouped by expert, W_e (F, D): forward, and backward (both gradients). "dense" is one
matrix product with as many operations, rows (R, D) through one matrix (F, D), and its two gradients.
layer: a whole layer of gated experts (``moe_mlp``): gathering, three products, activation, routing weights, sums.
"dense" is then the same three products with the weights of one expert, and their six gradients, and nothing else.

Loads: balanced; zipf, what a random router makes of tokens that are as frequent as words are; hot, half of all rows
to one expert; empty, every second expert without rows. In a round all contestants take their turn, and medians are
compared. "kept" is what a layer saves for backward beside parameters and routing, over SonicMoE's formula, N D + 2 R F
numbers. "bytes" is the least time that reading the operands and writing the results once would take, at the rate of a
copy on this machine, as a share of the dense product's time: no path can be faster than that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from bench_step import machine
from moe_kernels import expert_mlp, grouped_mm, keep_freed_memory
from torch import Tensor


class Shape(NamedTuple):
    """R rows of width D, E experts of width F."""

    R: int
    D: int
    F: int
    E: int


# The first three are those of the table; coarse to fine; the last has 40 rows for each expert.
SHAPES = [
    Shape(4096, 1024, 512, 8),
    Shape(4096, 512, 256, 32),
    Shape(8192, 512, 128, 128),
    Shape(4096, 512, 1024, 8),
    Shape(16384, 512, 256, 64),
    Shape(20480, 512, 128, 512),
]
LOADS = ("balanced", "zipf", "hot", "empty")
# backend -> (name of it in moe_kernels, whether compiled code may be used)
BACKENDS = {"cpu": ("cpu", True), "cpu, not compiled": ("cpu", False), "grouped_mm": ("grouped_mm", True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py experts``."""
    parser.add_argument("--threads", nargs="+", type=int, default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=list(range(len(SHAPES))))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--parts", nargs="+", choices=["product", "layer"], default=["product", "layer"])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each contestant")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run all; prints a line for each contest and returns what goes into the JSON file."""
    if args.rounds < 1 or min(args.threads) < 1:
        raise SystemExit("bench: --rounds and --threads must be at least 1")
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for threads in dict.fromkeys(args.threads):
        torch.set_num_threads(threads)
        rate = copy_rate()
        print(
            f"\n{threads} threads; a copy moves {rate / 1e9:.0f} GB/s. Shares of dense, forward / backward:", flush=True
        )
        for shape in (SHAPES[i] for i in args.shapes):
            for dtype in (getattr(torch, name) for name in args.dtypes):
                for load in args.loads:
                    for part in args.parts:
                        rows += contest(shape, dtype, load, part, threads, args.rounds, rate)
    return {"command": " ".join(sys.argv), "machine": machine(), "rows": rows}


def copy_rate() -> float:
    """Bytes per second, read and written."""
    source = torch.zeros(2**26, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(functools.partial(target.copy_, source)) for _ in range(10))


def contest(
    s: Shape, dtype: torch.dtype, load: str, part: str, threads: int, rounds: int, rate: float
) -> list[dict[str, Any]]:
    """Rows of one shape: dense, then every backend."""
    counts = loads(load, s)
    contestants = {"dense": (product_dense if part == "product" else layer_dense)(s, dtype)}
    for name, (backend, allowed) in BACKENDS.items():
        with compiled(allowed):
            contestants[name] = (product if part == "product" else layer)(s, dtype, counts, backend)
    took: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contestants}
    for i in range(rounds + 2):
        for name, (forward, backward) in contestants.items():
            with compiled(BACKENDS.get(name, ("", True))[1]):
                times = seconds(forward), seconds(backward)
            if i >= 2:
                for list_, t in zip(took[name], times, strict=True):
                    list_.append(t)
    kept = kept_by_layer(s, dtype, counts) if part == "layer" else {}
    medians = {name: tuple(map(statistics.median, pair)) for name, pair in took.items()}
    rows = []
    for name, pair in medians.items():
        for which, t in enumerate(pair):
            rows.append(
                s._asdict()
                | {"dtype": str(dtype)[6:], "load": load, "part": part, "threads": threads, "backend": name}
                | {"pass": ("forward", "backward")[which], "seconds": t, "of dense": medians["dense"][which] / t}
                | {"to grouped_mm": medians["grouped_mm"][which] / t, "kept, of formula": kept.get(name)}
                | {"bytes, of dense": least_bytes(s, dtype, counts, part, which) / rate / medians["dense"][which]}
            )
    shares = [f"{n} {r[0]['of dense']:.2f} / {r[1]['of dense']:.2f}" for n, r in pairs(rows)]
    shares += [f"bytes {rows[0]['bytes, of dense']:.2f} / {rows[1]['bytes, of dense']:.2f}"]
    shares += [f"kept {', '.join(f'{k:.2f}' for k in kept.values())}"] if kept else []
    print(f"{tuple(s)!s:24} {str(dtype)[6:]:8} {load:8} {part:7}  {'   '.join(shares)}", flush=True)
    return rows


def pairs(rows: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[dict[str, Any], dict[str, Any]]]]:
    """(backend, (forward's row, backward's row)) of all but dense."""
    for forward, backward in zip(rows[2::2], rows[3::2], strict=True):
        yield forward["backend"], (forward, backward)


def loads(name: str, s: Shape) -> list[int]:
    """Rows of each expert, which sum to R."""
    g = torch.Generator().manual_seed(0)
    if name == "balanced":
        return [s.R // s.E + (e < s.R % s.E) for e in range(s.E)]
    if name == "hot":
        rest = loads("balanced", s._replace(R=s.R // 2, E=s.E - 1))
        return [s.R - sum(rest), *rest]
    if name == "empty":
        full = loads("balanced", s._replace(E=s.E // 2))
        return [n for count in full for n in (count, 0)]
    words = 8192
    frequency = 1 / torch.arange(1, words + 1)
    word_R = torch.multinomial(frequency, s.R, replacement=True, generator=g)
    scores = torch.randn(words, s.E, generator=g)[word_R] + torch.randn(s.R, s.E, generator=g)
    return scores.argmax(1).bincount(minlength=s.E).tolist()


def normal(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


Passes = tuple[Callable[[], object], Callable[[], object]]


def passes(call: Callable[[], Tensor], leaves: list[Tensor]) -> Passes:
    """(forward, backward) of a differentiable call."""
    out = call()
    above = normal(out.dtype, *out.shape)
    return call, functools.partial(torch.autograd.grad, out, leaves, above, retain_graph=True)


def product(s: Shape, dtype: torch.dtype, counts: list[int], backend: str) -> Passes:
    x = normal(dtype, s.R, s.D).requires_grad_()
    w = normal(dtype, s.E, s.F, s.D, scale=s.D**-0.5).requires_grad_()
    return passes(functools.partial(grouped_mm, x, w, counts, backend=backend), [x, w])


def layer(s: Shape, dtype: torch.dtype, counts: list[int], backend: str) -> Passes:
    return passes(*layer_call(s, dtype, counts, backend))


def layer_call(
    s: Shape, dtype: torch.dtype, counts: list[int], backend: str
) -> tuple[functools.partial[Tensor], list[Tensor]]:
    """(a layer on four rows of each token, what it is differentiated in)."""
    x, index_R = normal(dtype, s.R // 4, s.D).requires_grad_(), torch.arange(s.R) * 7919 % (s.R // 4)
    weight_R = normal(dtype, s.R).sigmoid().requires_grad_()
    w13 = normal(dtype, s.E, 2, s.F, s.D, scale=s.D**-0.5).requires_grad_()
    w2 = normal(dtype, s.E, s.D, s.F, scale=s.F**-0.5).requires_grad_()
    call = functools.partial(expert_mlp, x, counts, w13, w2, index_R=index_R, weight_R=weight_R, backend=backend)
    return call, [x, w13, w2, weight_R]


def kept_by_layer(s: Shape, dtype: torch.dtype, counts: list[int]) -> dict[str, float]:
    """Of every backend, the bytes that a layer saves for backward as a share of the formula's."""
    found = {}
    for name, (backend, allowed) in BACKENDS.items():
        saved: dict[int, int] = {}

        def keep(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with compiled(allowed):
            call, leaves = layer_call(s, dtype, counts, backend)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                call()
        for t in (*leaves[1:], call.keywords["index_R"]):
            saved.pop(t.untyped_storage().data_ptr(), None)
        formula = (s.R // 4 * s.D + 2 * s.R * s.F) * dtype.itemsize
        found[name] = sum(saved.values()) / formula
    return found


def product_dense(s: Shape, dtype: torch.dtype) -> Passes:
    x, w, dy = normal(dtype, s.R, s.D), normal(dtype, s.F, s.D), normal(dtype, s.R, s.F)
    return lambda: torch.mm(x, w.t()), lambda: (torch.mm(dy, w), torch.mm(dy.t(), x))


def layer_dense(s: Shape, dtype: torch.dtype) -> Passes:
    x, w13, w2 = normal(dtype, s.R, s.D), normal(dtype, 2 * s.F, s.D), normal(dtype, s.D, s.F)
    a, dh = normal(dtype, s.R, s.F), normal(dtype, s.R, 2 * s.F)
    return (
        lambda: (torch.mm(x, w13.t()), torch.mm(a, w2.t())),
        lambda: (torch.mm(x, w2), torch.mm(x.t(), a), torch.mm(dh, w13), torch.mm(dh.t(), x)),
    )


def least_bytes(s: Shape, dtype: torch.dtype, counts: list[int], part: str, which: int) -> int:
    """Bytes of weights of experts that have rows and of rows, each read once, and of results, each written once."""
    weights = sum(n > 0 for n in counts) * s.D * s.F
    if part == "product":
        elements = (weights + s.R * (s.D + s.F), 2 * weights + s.R * (2 * s.D + s.F))[which]
    else:  # x, h and the output; backward reads x, h and the output's gradient, and writes that of x
        elements = (3 * weights + s.R * (s.D + 2 * s.F + s.D), 6 * weights + s.R * (3 * s.D + 2 * s.F))[which]
    return elements * dtype.itemsize


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def compiled(allowed: bool) -> Iterator[None]:
    """Whether the path "cpu" may use what was compiled for this machine."""
    before = os.environ.get("MOE_KERNELS_NATIVE")
    os.environ["MOE_KERNELS_NATIVE"] = "1" if allowed else "0"
    try:
        yield
    finally:
        del os.environ["MOE_KERNELS_NATIVE"]
        if before is not None:
            os.environ["MOE_KERNELS_NATIVE"] = before
