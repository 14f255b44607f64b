"""Checks the Triton kernels on a GPU, times every backend of the experts, and trains: ``python scripts/gpu_check.py``.

Needs torch, triton and the folder kernels/ beside this one's; for attention and training also moetrain/, launch/,
configs/ and what moetrain imports, which --wheels may bring. First come checks against float64, then times
(``gpu_times.py``, ``gpu_attention.py``) and training (``gpu_train.py``). Much of the time goes into compiling, which
``gpu_cache.py`` can do elsewhere beforehand (--cache), and into tuning; triton keeps both on disk. Nothing is begun
that would end past --minutes. With --device cpu --tiny all of it runs on the CPU; the Triton kernels only with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from gpu_attention import check_attention, time_attention
from gpu_cache import use
from gpu_ops import op_checks, time_ops
from gpu_times import (
    ROUNDED,
    SHAPES,
    TINY,
    Shape,
    layer_inputs,
    measure,
    measure_rounding,
    normal,
    obstacles,
    runnable,
    weights,
)
from gpu_train import missing, train
from moe_kernels import ACTIVATIONS, expert_mlp, moe_mlp
from moe_kernels.gpu.available import triton_obstacle

# Each of its products has more blocks than a GPU has persistent programs, so that these go from one to the next.
CHECKED = Shape("check", 9000, 256, 256, 80, 4)


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


def checks(device: str, tiny: bool) -> list[dict[str, Any]]:
    """All checks; those of the Triton kernels only where these can run."""
    rows = check_backends(device, TINY if tiny else CHECKED)
    why = triton_obstacle(torch.device(device), torch.bfloat16)
    if why is not None:
        print(f"no checks of the Triton kernels: {why}")
        return rows
    D, F = (24, 20) if tiny else (136, 72)  # no multiples of a tile
    cases = [(torch.bfloat16, activation) for activation in ACTIVATIONS]
    cases += [(torch.float16, "swiglu"), (torch.float32, "swiglu")]
    rows += [check_experts(device, D, F, *case) for case in cases]
    rows += [check(name, limit, error) for name, limit, error in op_checks(device, tiny)]
    if triton_obstacle(torch.device(device), torch.bfloat16, fp8=True) is None:
        rows.append(check_fp8(device, TINY if tiny else Shape("check", 600, 272, 144, 5, 2)))
    return rows + (check_capture(CHECKED) if device == "cuda" else [])


def check_backends(device: str, shape: Shape) -> list[dict[str, Any]]:
    """A whole layer through every backend that runs here, against the loop in float64."""
    inputs, ids_TK = layer_inputs(device, shape)
    want = run(inputs, torch.float64, lambda **t: moe_mlp(ids_TK=ids_TK, backend="loop", **t))

    def error(backend: str) -> float:
        return worst(run(inputs, torch.bfloat16, lambda **t: moe_mlp(ids_TK=ids_TK, backend=backend, **t)), want)

    return [check(f"layer, {name}", 2e-2, lambda name=name: error(name)) for name in runnable(device, *shape[2:4])]


def check_experts(device: str, D: int, F: int, dtype: torch.dtype, activation: str) -> dict[str, Any]:
    """Uneven and empty experts, some with biases."""
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
    triton = functools.partial(call, counts=counts_e, backend="triton")
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    return check(f"{activation} {str(dtype)[6:]}", limit, lambda: worst(run(inputs, dtype, triton), want))


def check_capture(shape: Shape) -> list[dict[str, Any]]:
    """A Triton layer under torch.compile, and captured in a CUDA graph and replayed with another routing."""
    inputs, ids_TK = layer_inputs("cuda", shape)
    half = {name: t.bfloat16() for name, t in inputs.items()}

    def layer(**args: Tensor) -> Tensor:
        return moe_mlp(ids_TK=ids_TK, backend="triton", **args)  # type: ignore[arg-type]

    def compiled() -> float:
        whole = torch.compile(layer, fullgraph=True)
        return worst(run(inputs, torch.bfloat16, whole), run(inputs, torch.bfloat16, layer))

    def captured() -> float:
        buffer, graph = ids_TK.clone(), torch.cuda.CUDAGraph()
        moe_mlp(ids_TK=buffer, backend="triton", **half)  # compiles and tunes
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = moe_mlp(ids_TK=buffer, backend="triton", **half)
        buffer.copy_(ids_TK.flip(0))
        graph.replay()
        return float(not torch.equal(out, moe_mlp(ids_TK=buffer, backend="triton", **half)))

    return [check("layer under torch.compile", 1e-2, compiled), check("layer in a CUDA graph", 0.0, captured)]


def check_fp8(device: str, shape: Shape) -> dict[str, Any]:
    """A layer in FP8 against its emulation on the CPU. Tensor cores keep about 14 bits of a sum, so some numbers become
    the E4M3 number beside theirs; FP8 itself is about 6e-2 from float64."""
    inputs, ids_TK = layer_inputs(device, shape)

    def error() -> float:
        got = run(inputs, torch.bfloat16, lambda **t: moe_mlp(ids_TK=ids_TK, backend="triton", fp8=True, **t))
        host = {name: t.cpu() for name, t in inputs.items()}
        want = run(host, torch.bfloat16, lambda **t: moe_mlp(ids_TK=ids_TK.cpu(), backend="cpu", fp8=True, **t))
        return worst({name: t.cpu() for name, t in got.items()}, want)

    return check("layer in FP8", 3e-2, error)


def check(name: str, limit: float, error: Callable[[], float]) -> dict[str, Any]:
    """A row of the result. What raises has failed, and the next check goes on."""
    try:
        found = error()
    except Exception:
        traceback.print_exc()
        found = float("inf")
    print(f"{'ok  ' if found <= limit else 'FAIL'} {name}: error {found:.1e}, limit {limit:.0e}", flush=True)
    return {"check": name, "error": found, "limit": limit, "ok": found <= limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all rows there, after each part")
    parser.add_argument("--minutes", type=float, default=9, help="the time that there is")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of what moetrain needs and is not here")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="take compiled kernels from there (gpu_cache.py)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small shape and model: to see that all parts run")
    parser.add_argument("--only", choices=["checks", "times", "train"], help="this part alone")
    args = parser.parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder '{args.json.parent}'")
    if args.minutes <= 0:
        parser.error(f"--minutes is more than 0, not {args.minutes:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no GPU here; it needs one of compute capability 8.0 or later, or --device cpu")
    if args.cache is not None:
        if not any(args.cache.glob("*/*.cubin")):
            sys.exit(f"gpu_check: there are no kernels in --cache {args.cache}; gpu_cache.py puts them into a folder")
        use(args.cache)
    failed = Parts(args).run()
    if failed:
        sys.exit(f"gpu_check: failed: {'; '.join(failed)}")


class Parts:
    """Checks, times and training, in turn, while there is time. What raises costs itself, not what comes after it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.end = args, time.monotonic() + 60 * args.minutes
        self.failed: list[str] = []
        name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        self.result: dict[str, Any] = {"device": name, "torch": torch.__version__, "shapes": [], "rounding": []}

    def run(self) -> list[str]:
        """The names of what failed."""
        device, tiny = self.args.device, self.args.tiny
        absent = missing(self.args.wheels)
        if absent is not None:
            print(f"no attention, no training: {absent}", flush=True)
        if self.wanted("checks"):
            self.attempt("checks", lambda: checks(device, tiny))
            if absent is None:
                self.attempt("checks", lambda: check_attention(device, check, worst))
            self.failed += [row["check"] for row in self.result.get("checks", []) if not row["ok"]]
        if self.wanted("times"):
            for name, why in obstacles(device, SHAPES[0].D, SHAPES[0].F).items():
                print(f"{name}: {why or 'runs'}", flush=True)
            if device == "cuda":
                self.attempt("ops", time_ops)
        shapes = [TINY] if tiny else SHAPES
        self.shapes(shapes[:4], keep=20 if tiny else 240)
        if absent is None and self.wanted("train") and self.left() > (20 if tiny else 100):
            self.attempt("train", lambda: train(device, tiny, self.left))
        if absent is None and self.wanted("times") and self.left() > (20 if tiny else 60):
            self.attempt("attention", lambda: time_attention(device, tiny))
        for shape in [TINY] if tiny else ROUNDED:
            if self.wanted("times") and self.left() > (20 if tiny else 60):
                tile = 16 if tiny else 128
                self.attempt("rounding", functools.partial(measure_rounding, shape, device, tile))
        self.shapes(shapes[4:], keep=60)
        return self.failed

    def shapes(self, shapes: list[Shape], keep: float) -> None:
        """Time them, while more than ``keep`` seconds are left."""
        for shape in shapes:
            if self.wanted("times") and self.left() > keep:
                self.attempt("shapes", functools.partial(measure, shape, self.args.device))

    def wanted(self, part: str) -> bool:
        return self.args.only in (None, part)

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def attempt(self, name: str, part: Callable[[], list[dict[str, Any]]]) -> None:
        """Add the rows of ``part`` to the result, and write it."""
        try:
            self.result.setdefault(name, []).extend(part())
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{name}: {type(error).__name__}")
        if self.args.json is not None:
            self.args.json.write_text(json.dumps(self.result, indent=1))
        if self.args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
