"""Builds the C++ files of this folder once for each machine and torch, and loads it.

The compiler is ``$CXX``, or g++, or c++; the result is kept under ``$XDG_CACHE_HOME``, or ~/.cache, in ``moe_kernels``.
MOE_KERNELS_NATIVE=0 keeps the compiled path from being used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from moe_kernels.uncompiled import uncompiled

logger = logging.getLogger("moe_kernels")

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
# -fno-math-errno and -fno-trapping-math let loops with rounding and comparisons vectorise; results stay the same.
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-std=c++17", "-fPIC", "-shared", "-fopenmp",
         "-fno-math-errno", "-fno-trapping-math")  # fmt: skip
BUILD_SECONDS = 300


@uncompiled
def native_obstacle(dtype: torch.dtype) -> str | None:
    """Why the compiled products cannot take rows of ``dtype``, or None where they can. The first call builds them."""
    if os.environ.get("MOE_KERNELS_NATIVE") == "0":
        return "MOE_KERNELS_NATIVE=0 forbids it"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it has no {str(dtype).removeprefix('torch.')}"
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    return None if _works(loaded) else "oneDNN has no kernel for tiles on this processor"


@uncompiled
def widens_halves() -> bool:
    """Whether bfloat16 is multiplied as float32, since the processor has no products of it, or slow ones. (torch's own
    are then two to more than ten times slower than float32.) Ask ``native_obstacle`` first."""
    loaded = _load()
    return not isinstance(loaded, str) and not loaded.moe_half_cells()


def widen_halves(widened: bool) -> None:
    """For tests: multiply bfloat16 as a processor that has no products of it does, or as one that has, if this can."""
    loaded = _load()
    if not isinstance(loaded, str):
        loaded.moe_use_half_cells(ctypes.c_int64(not widened))


@uncompiled
def call(function: str, *arguments: torch.Tensor | int | float | None) -> None:
    """Call a function of the library with pointers to tensors, and numbers. Meta tensors (a dry run) have none: nothing
    is done.

    Raises:
        RuntimeError: it was not built; ask ``native_obstacle`` first. Or a tensor is not in the CPU's memory.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(f"the compiled CPU kernels are not there: {loaded}")
    if any(isinstance(a, torch.Tensor) and a.is_meta for a in arguments):
        return
    getattr(loaded, function)(*map(_argument, arguments))


def _argument(value: torch.Tensor | int | float | None) -> Any:
    if isinstance(value, torch.Tensor):
        if not value.is_cpu or (value.data_ptr() == 0 and value.numel()):
            kind = f"{type(value).__name__} on {value.device}"
            raise RuntimeError(
                f"the compiled CPU kernels take plain tensors on the CPU (of a DTensor, its local one), not a {kind}"
            )
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return None
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


@functools.cache
def _works(library: ctypes.CDLL) -> bool:
    return bool(library.moe_works())


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none; that is logged, once."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = _reason(error)
        logger.warning(
            "experts on CPU run without compiled kernels, up to twice slower (bfloat16 far slower on "
            "processors without products of it): %s",
            reason,
        )
        return reason


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    """One line."""
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr.strip().splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else "it says nothing")
        return f"{error.cmd[0]} ended with status {error.returncode}: {first}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took longer than {error.timeout:.0f} s"
    return str(error)


def _built() -> Path:
    """The library's file, compiled if it is not there yet."""
    compiler = next(
        (found for name in (os.environ.get("CXX"), "g++", "c++") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        raise OSError("no C++ compiler was found (g++, or the one that CXX names)")
    libraries = Path(torch.__file__).parent / "lib"
    # torch's own OpenMP, so that there is one pool of threads
    threads = sorted(libraries.glob("libgomp*.so*"))[:1]
    links = [str(libraries / "libtorch_cpu.so"), *map(str, threads)]
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.[ch]*"))]
    key = "\n".join([*texts, compiler, *FLAGS, *links, torch.__version__, _processor()])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without HOME and of a number that is no account's, as in containers
        raise OSError("there is no home folder to keep them in; set XDG_CACHE_HOME")
    folder = Path(cache) / "moe_kernels"
    target = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _in_turn(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder) as scratch:
            if not target.exists():
                out = Path(scratch) / target.name
                command = [compiler, *FLAGS, *map(str, SOURCES), *links, "-o", str(out)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
                out.replace(target)  # where there are no locks, others may build it too; any result will do
    return target


@contextmanager
def _in_turn(path: Path) -> Iterator[None]:
    """Let the processes that share the file ``path`` in one after another, where the system has locks."""
    with path.open("w") as file:
        with suppress(ImportError, OSError):  # Windows, some NFS
            fcntl = importlib.import_module("fcntl")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _processor() -> str:
    """What -march=native depends on: nodes that share a home folder may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
