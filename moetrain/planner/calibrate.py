"""``moetrain plan calibrate``: measure this machine and write a cluster file.

Products of several sizes, copies through memory, the start of an operation, and gloo's all-to-all by size, among as
many ranks as there are cores. On GPUs the links between them are not measured: they are those of the cluster ``base``.
"""

from __future__ import annotations

import os
import re
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from moetrain_launch.fork import run_ranks

from moetrain.config.errors import ConfigError
from moetrain.planner.cluster import load_cluster, read_cluster
from moetrain.planner.rates import FITTED

SIZES = (128, 256, 512, 1024)  # of square products; on a GPU 8 times these
BYTES = tuple(1 << n for n in range(10, 25, 2))  # of collectives
REPEATS = 5


def run(words: Sequence[str]) -> str:
    """Measure, and write what was found. Raises ConfigError."""
    out, ranks, base = Path("this-machine.yaml"), 0, None
    for word in words:
        name, _, value = word.partition("=")
        if name == "out" and value.endswith((".yaml", ".yml")):
            out = Path(value)
        elif name == "ranks" and re.fullmatch("[0-9]+", value) and 1 <= int(value) <= 64:
            ranks = int(value)
        elif name == "base" and value:
            base = load_cluster(value)
        else:
            raise ConfigError(f"plan calibrate takes out=FILE.yaml, ranks=N (1 to 64) and base=CLUSTER; got '{word}'")
    if torch.cuda.is_available() and base is None:
        raise ConfigError("plan calibrate measures no links between GPUs: give base=NAME of a cluster that has them")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.absolute().parent}")
    found = measure(1 if base else ranks or max(1, min(8, len(os.sched_getaffinity(0)))))
    if base is not None:
        keep = ("node", "domain", "link_gb_s", "link_us", "network_gb_s", "network_us", "host_gb_s", "host_gib")
        found |= {name: getattr(base, name) for name in keep}
    text = f"# Measured on {socket.gethostname()} by 'moetrain plan calibrate'; see docs/plan.md.\n"
    out.write_text(text + yaml.safe_dump(found, sort_keys=False))
    read_cluster(out)
    return text + yaml.safe_dump(found, sort_keys=False) + f"wrote {out}; use it with cluster={out}"


def measure(ranks: int) -> dict[str, Any]:
    """The settings of a cluster file. All ranks compute at the same time, as they do in a run."""
    on_gpu = torch.cuda.is_available()
    rows = [_of_rank(1)] if ranks == 1 else run_ranks(ranks, _of_rank, ranks, timeout=600)
    memory = (
        torch.cuda.mem_get_info()[1] if on_gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
    )

    def mean(name: str) -> float:
        return float(statistics.mean(row[name] for row in rows))

    # The planner takes peaks, of which a large product reaches a share.
    share = FITTED.product_16
    tflops = {"float32": mean("float32") / share, "bf16": max(mean("bf16"), mean("float32")) / share}
    link = {"gb_s": 10.0, "us": 10.0} if ranks == 1 else {"gb_s": mean("gb_s") / FITTED.plain, "us": mean("us")}
    memory_gb_s = mean("copy") / FITTED.memory
    link["gb_s"] = min(link["gb_s"], memory_gb_s)
    found: dict[str, Any] = {
        "name": "this-machine", "device": torch.cuda.get_device_name() if on_gpu else "CPU, some cores a rank",
        "kind": "gpu" if on_gpu else "cpu", "node": ranks, "domain": ranks, "memory_gib": memory / 2**30,
        "tflops": tflops, "memory_gb_s": memory_gb_s, "link_gb_s": link["gb_s"], "link_us": link["us"],
        "network_gb_s": link["gb_s"], "network_us": link["us"], "host_gb_s": memory_gb_s,
        "host_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, "launch_us": mean("start"),
    }  # fmt: skip
    return {key: _rounded(value) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _of_rank(ranks: int) -> dict[str, float]:
    """On one rank: 10^12 FLOPs/s by dtype, 10^9 bytes/s of a copy, microseconds of an operation's start; and of the
    collectives, fitted to all sizes: seconds = us + bytes / gb_s."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    scale = 8 if device.type == "cuda" else 1
    found = {
        name: _products(dtype, device, scale) for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
    }
    x = torch.empty(scale * 2**24, device=device)
    y = torch.empty_like(x)
    found["copy"] = 2 * x.nbytes / _seconds(lambda: y.copy_(x), device) / 1e9
    small = torch.ones(64, device=device)
    found["start"] = _seconds(lambda: [small.add(1) for _ in range(100)], device) / 100 * 1e6
    if ranks > 1:
        times = [_exchange(size, ranks, device) for size in BYTES]
        # least squares on relative errors, so that small sizes count as much as large ones
        a, b = _line([size * (ranks - 1) / ranks for size in BYTES], times)
        found["us"], found["gb_s"] = max(0.1, a * 1e6), max(1e-3, 1 / b / 1e9)
    return found


def _products(dtype: torch.dtype, device: torch.device, scale: int) -> float:
    best = 0.0
    for size in SIZES:
        n = size * scale
        a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
        best = max(best, 2 * n**3 / _seconds(lambda a=a, b=b: a @ b, device) / 1e12)  # type: ignore[misc]
    return best


def _exchange(size: int, ranks: int, device: torch.device) -> float:
    n = max(1, size // 4 // ranks)
    given, taken = torch.empty(n * ranks, device=device), torch.empty(n * ranks, device=device)
    dist.barrier()
    return _seconds(lambda: dist.all_to_all_single(taken, given), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs, after one that warms up."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(REPEATS))


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b) with seconds = a + b * size, least in squares of relative errors; b above 0."""
    w = [1 / s**2 for s in seconds]
    n, sx, sy = (
        sum(w),
        sum(a * x for a, x in zip(w, sizes, strict=True)),
        sum(a * y for a, y in zip(w, seconds, strict=True)),
    )
    sxx = sum(a * x * x for a, x in zip(w, sizes, strict=True))
    sxy = sum(a * x * y for a, x, y in zip(w, sizes, seconds, strict=True))
    b = max((n * sxy - sx * sy) / (n * sxx - sx * sx), 1e-15)
    return max((sy - b * sx) / n, 1e-7), b
