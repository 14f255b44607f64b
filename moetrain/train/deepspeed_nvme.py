"""What offload to files needs before DeepSpeed starts: a folder that can be written, and its compiled file access."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from moetrain.config.errors import ConfigError

log = logging.getLogger("moetrain")


def get_file_access_ready(folder: str) -> None:
    """Compile DeepSpeed's asynchronous file access where that has not been done yet: minutes, once a machine.

    The ranks of a machine take turns. Raises ConfigError for a folder that cannot be written, and where libaio or a
    compiler is missing.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"parallel.nvme={folder} cannot be made: {str(error.strerror).lower()}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"parallel.nvme={folder} is not writable; choose another folder")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"parallel.nvme={folder}: DeepSpeed's file access cannot be built here, it needs libaio with its headers; "
            "install them (Debian: apt-get install libaio-dev) or set parallel.nvme=null"
        )
    builds = [_build_folder(name) for name in ("pin_memory", AsyncIOBuilder.NAME)]
    with open(builds[-1].parent / "moetrain.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for build in builds:
            # torch's lock file stays when its holder is killed, and all later jobs would wait for it without end.
            (build / "lock").unlink(missing_ok=True)
        if not (builds[-1] / f"{AsyncIOBuilder.NAME}.so").exists():
            log.info("compiling DeepSpeed's file access in %s: some minutes, this once", builds[-1])
        try:
            AsyncIOBuilder().load(verbose=False)
        except (RuntimeError, ImportError, OSError) as error:
            reason = str(error).strip().splitlines() or ["no reason given"]
            raise ConfigError(
                f"parallel.nvme={folder}: DeepSpeed's file access cannot be compiled ({reason[0]}); see that g++ and "
                f"ninja are there, or set parallel.nvme=null"
            ) from None


def _build_folder(name: str) -> Path:
    """Where torch compiles the extension ``name`` to; made if need be."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False))
