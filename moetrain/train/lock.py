"""One run to a run directory: a lock that the system lets go of when its holder ends, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.comm.ranks import Ranks
from moetrain.config.errors import ConfigError

LOCK = "lock"
WAIT_S = 3.0  # a run that was just killed may still hold it


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir/lock``, made if need be, on rank 0 while the body runs. Collective. Raises ConfigError when
    another run holds it. Where the file system knows no locks (some NFS), there is none."""
    held: list[int] = []
    try:
        Ranks().first(lambda: held.append(_take(run_dir)))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _take(run_dir: Path) -> int:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written: {error.strerror}; choose another run_dir") from None
    end = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ConfigError(
                f"{run_dir} is in use by another run ({holder}); wait for its end, stop it, or choose another run_dir"
            ) from None
        except OSError:
            return descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return descriptor
