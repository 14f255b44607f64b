"""What a process needs before it can train: its device, threads, process group, seeds and log."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_kernels import keep_freed_memory
from moe_kernels.native.library import native_obstacle
from moetrain_launch.local import cores
from tqdm import tqdm

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config

log = logging.getLogger("moetrain")

# Where a user may have chosen how memory of the GPU is given out. NCCL cannot register memory of segments that grow.
ALLOCATOR = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK",
)


def refuse_no_gpu(name: str) -> None:
    """Raise ConfigError where ``device: cuda`` is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; use device=auto or device=cpu")


def pick_device(name: str) -> torch.device:
    """The device of this rank for ``device: auto|cpu|cuda``. Raises ConfigError when cuda is asked for and absent, or
    has not a GPU for every rank of this machine."""
    refuse_no_gpu(name)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank, seen = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    ranks = max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if seen == 1 and "SLURM_LOCALID" in os.environ:  # Slurm may show each task its own GPU alone
        rank = 0
    elif ranks > seen:
        raise ConfigError(
            f"{ranks} ranks on a machine where torch sees {seen} GPU{'s' if seen > 1 else ''}; each rank takes one: "
            f"use launch.ranks={seen}, or device=cpu"
        )
    device = torch.device("cuda", rank)
    # Experts get another number of rows in every step. From segments of fixed sizes that leaves gaps, until memory runs
    # out though a good part of it is free. torch reads this when CUDA begins.
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    torch.cuda.set_device(device)
    return device


@contextmanager
def timeout_of_new_groups(timeout: timedelta) -> Iterator[None]:
    """Give this timeout to all process groups that are made meanwhile and name none, as those of a mesh.

    torch's own is 30 minutes with gloo, whatever that of the default group is, and a group that has been made cannot be
    changed altogether: receiving in a pipeline would keep the first timeout.
    """
    c10d: Any = dist.distributed_c10d
    before = c10d.default_pg_timeout, c10d.default_pg_nccl_timeout
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    try:
        yield
    finally:
        c10d.default_pg_timeout, c10d.default_pg_nccl_timeout = before


@contextmanager
def process_group(device: torch.device, timeout_s: int) -> Iterator[None]:
    """The default process group: from the launcher's environment, or of this one process when there is no launcher.
    All groups that are made in it have its timeout.

    After an error of one of several ranks it is left as it is: to destroy it could wait for ranks that are gone.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        with timeout_of_new_groups(timeout):
            yield
    except BaseException:
        if dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def set_up_torch(cfg: Config, ranks_here: int) -> None:
    """Threads, seeds and determinism. ``ranks_here``: processes that share this machine's cores."""
    if pick_device(cfg.device).type == "cpu":
        keep_freed_memory()  # before there are large tensors
        if cfg.train.precision != "float64":  # built now, half a minute once, and not while ranks wait for each other
            native_obstacle(torch.float32)
    torch.set_num_threads(cfg.train.threads or threads(ranks_here))
    torch.manual_seed(cfg.seed)
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Determinism does not need fresh memory to be filled; every value that is read has been written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    quiet()


def threads(ranks_here: int) -> int:
    """Threads of a rank, one of ``ranks_here`` that share the cores of this process; Slurm may give each its own."""
    shared = cores() // ranks_here
    if "SLURM_LOCALID" in os.environ:
        shared = min(cores(), (os.cpu_count() or 1) // ranks_here)
    return max(1, shared)


def quiet() -> None:
    """Silence warnings of torch about what is meant so."""
    # A weight that two meshes split is gathered in two steps, which torch would rather have in one.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    # Nothing here writes to a module's output in place, which is what FSDP warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class _AboveBar(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes log lines to the terminal above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except (OSError, ValueError):  # a terminal that is gone ends no run
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that a full disk silences, and nothing more: the terminal still shows every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


def set_up_log(run_dir: Path, rank: int) -> None:
    """Send log lines, also those of moe_kernels, to the terminal and to ``run_dir/log.txt``. Ranks other than 0 only
    show errors."""
    terminal = _AboveBar()
    terminal.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    handlers: list[logging.Handler] = [terminal]
    if rank == 0:
        file = _LogFile(run_dir / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    for logger in (log, logging.getLogger("moe_kernels")):
        logger.handlers[:] = handlers
        logger.propagate = False
        logger.setLevel(logging.INFO)


def peak_tflops(device: torch.device, asked: float | None) -> float | None:
    """Dense bf16 peak of the device in TFLOP/s (vendor data sheets), or ``asked``; None when it is not known."""
    if asked is not None or device.type != "cuda":
        return asked
    name = torch.cuda.get_device_name(device)
    known = {"GB200": 2500.0, "B200": 2250.0, "H200": 989.5, "H100": 989.5, "H800": 989.5, "A100": 312.0, "V100": 125.0}
    return next((tflops for key, tflops in known.items() if key in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far, in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
