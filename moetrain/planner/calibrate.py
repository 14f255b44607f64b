"""``moetrain plan calibrate``: measure this machine and write a cluster file.

Products of several sizes, copies through memory, the start of an operation, and gloo's collectives by size, among as
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
from moe_kernels.native.library import native_obstacle, widens_halves
from moetrain_launch.fork import run_ranks

from moetrain.comm.even import all_gather, reduce_scatter
from moetrain.config.errors import ConfigError
from moetrain.planner.cluster import load_cluster, read_cluster
from moetrain.planner.rates import FITTED

SIZES = (128, 256, 512, 1024)  # of square products; on a GPU 8 times these
BYTES = tuple(1 << n for n in range(10, 25, 2))  # of collectives
REPEATS, WAITS, CHAIN = 5, 25, 100


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
    rings = {} if ranks == 1 else {"ring_gb_s": mean("ring_gb_s"), "ring_us": mean("ring_us")}
    memory_gb_s = mean("copy") / FITTED.memory
    link["gb_s"] = min(link["gb_s"], memory_gb_s)
    found: dict[str, Any] = {
        "name": "this-machine", "device": torch.cuda.get_device_name() if on_gpu else "CPU, some cores a rank",
        "kind": "gpu" if on_gpu else "cpu", "node": ranks, "domain": ranks, "memory_gib": memory / 2**30,
        "tflops": tflops, "memory_gb_s": memory_gb_s, "link_gb_s": link["gb_s"], "link_us": link["us"],
        **rings,
        "network_gb_s": link["gb_s"], "network_us": link["us"], "host_gb_s": memory_gb_s,
        "host_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, "launch_us": mean("start"),
    }  # fmt: skip
    return {key: _rounded(value) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _of_rank(ranks: int) -> dict[str, float]:
    """On one rank: 10^12 FLOPs/s by dtype, 10^9 bytes/s of a copy, microseconds of an operation's start; and of
    all-to-all and of gathering and reducing (ring), fitted to all sizes: seconds = us + bytes / gb_s."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    scale = 8 if device.type == "cuda" else 1
    found = {"float32": _products(torch.float32, device, scale)}
    # Where a CPU multiplies bfloat16 as float32, torch's own products of it are slow, and training avoids them.
    as_float32 = device.type == "cpu" and native_obstacle(torch.bfloat16) is None and widens_halves()
    found["bf16"] = found["float32"] if as_float32 else _products(torch.bfloat16, device, scale)
    x = torch.empty(scale * 2**24, device=device)
    y = torch.empty_like(x)
    found["copy"] = 2 * x.nbytes / _seconds(lambda: y.copy_(x), device) / 1e9
    found["start"] = _seconds(lambda: _chain(device), device) / CHAIN * 1e6
    if ranks > 1:
        for prefix, collective in (("", _exchange), ("ring_", _gather_and_reduce)):
            times = [collective(size, ranks, device) for size in BYTES]
            # least squares on relative errors, so that small sizes count as much as large ones
            a, b = _line([size * (ranks - 1) / ranks for size in BYTES], times)
            found[prefix + "us"], found[prefix + "gb_s"] = max(0.1, a * 1e6), max(1e-3, 1 / b / 1e9)
    return found


def _chain(device: torch.device) -> None:
    """Small operations as training starts them: each with its node of autograd, and its gradient."""
    y = x = torch.ones(64, device=device, requires_grad=True)
    for _ in range(CHAIN):
        y = y + 1
    torch.autograd.grad(y.sum(), x)


def _products(dtype: torch.dtype, device: torch.device, scale: int) -> float:
    """The best rate on a GPU, whose losses at small sizes the planner knows; on a CPU the median one."""
    rates = []
    for size in SIZES:
        n = size * scale
        a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
        rates.append(2 * n**3 / _seconds(lambda a=a, b=b: a @ b, device) / 1e12)  # type: ignore[misc]
    return max(rates) if device.type == "cuda" else statistics.median(rates)


def _exchange(size: int, ranks: int, device: torch.device) -> float:
    n = max(1, size // 4 // ranks)
    given, taken = torch.empty(n * ranks, device=device), torch.empty(n * ranks, device=device)
    return _between(lambda: dist.all_to_all_single(taken, given), device)


def _gather_and_reduce(size: int, ranks: int, device: torch.device) -> float:
    """The mean of both as FSDP does them: gathered and copied out, copied in and reduced."""
    world = dist.group.WORLD
    assert world is not None
    part = torch.empty(max(1, size // 4 // ranks), device=device)
    full = all_gather(part, world)
    gather = _between(lambda: all_gather(part, world).clone(), device)
    return (gather + _between(lambda: reduce_scatter(full.clone(), world), device)) / 2


def _between(collective: Callable[[], object], device: torch.device) -> float:
    """Seconds of a collective between products, as training has it: ranks do not come to it at the same moment. The
    mean, since a step waits for late ones, too."""
    a = torch.randn(256, 256, device=device)
    dist.barrier()
    return statistics.fmean(_times(collective, device, WAITS, lambda: a @ a))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs."""
    return statistics.median(_times(run, device, REPEATS))


def _times(
    run: Callable[[], object], device: torch.device, repeats: int, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each run, after one that warms up. before: what is done ahead of each, and not timed."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    run()
    found = []
    for _ in range(repeats):
        before()
        start = now()
        run()
        found.append(now() - start)
    return found


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
