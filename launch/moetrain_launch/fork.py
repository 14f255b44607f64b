"""Run a function on several gloo ranks of this machine, forked from this process.

Forking after the imports makes a world start in a tenth of a second, so every case gets a fresh one; a case that fails
or hangs its ranks harms no other.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_fork = multiprocessing.get_context("fork")
# Once a rank has failed, the others get this long to report a failure of their own before they are killed.
GRACE_S = 1.0


def run_ranks(world: int, fn: Callable[..., T], *args: Any, timeout: float = 120) -> list[T]:
    """``fn(*args)`` on each of ``world`` ranks, in a gloo process group of their own; the results in rank order.

    Within ``fn`` the rank is ``dist.get_rank()``. Arguments may be anything (ranks are forks); results must pickle.
    A rank has one thread; it may ask for more only where this process has never used more: a fork has the team of
    OpenMP's threads on paper alone, and waits for it.
    timeout: seconds for the whole world. Raises RuntimeError with the traceback of the rank that failed first (the
    later failures of the others are mostly its consequence), TimeoutError when ranks are still running at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_fork.Process(target=_run_one, args=(Path(folder), rank, world, fn, args)) for rank in range(world)]
        gc.freeze()  # what a rank's garbage collector does not touch stays shared with this process
        for process in ranks:
            process.start()
        gc.unfreeze()
        try:
            finished = _wait(ranks, timeout)
            failure = _first_failure(Path(folder), ranks)  # while all live: the others fail when one is killed
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        if failure is not None:
            raise RuntimeError(failure)
        if not finished:
            raise TimeoutError(f"{world} ranks did not finish within {timeout} s")
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world)]


def _run_one(folder: Path, rank: int, world: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Body of one rank. Leaves through os._exit, so that nothing of the parent (pytest, exit hooks) runs twice."""
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        result = pickle.dumps(fn(*args))
        dist.barrier()  # nobody leaves while another still needs its answers
        (folder / f"result-{rank}").write_bytes(result)
        code = 0
    except BaseException:
        (folder / f"failure-{rank}").write_text(f"{time.time()}\n{traceback.format_exc()}")
    finally:
        os._exit(code)


def _wait(ranks: list[ForkProcess], timeout: float) -> bool:
    """Wait until all ranks have ended, or one has failed and its grace is over. False: the time was up first."""
    end = time.monotonic() + timeout
    failed_at: float | None = None
    while any(process.is_alive() for process in ranks):
        now = time.monotonic()
        if now > end:
            return False
        if failed_at is None and any(process.exitcode not in (None, 0) for process in ranks):
            failed_at = now
        if failed_at is not None and now > failed_at + GRACE_S:
            return True
        time.sleep(0.005)
    return True


def _first_failure(folder: Path, ranks: list[ForkProcess]) -> str | None:
    """Which rank failed first, and how; None where none did."""
    failures = []
    for rank in range(len(ranks)):
        file = folder / f"failure-{rank}"
        if file.exists():
            when, _, text = file.read_text().partition("\n")
            failures.append((float(when), rank, text))
    if failures:
        _, rank, text = min(failures)
        return f"rank {rank} of {len(ranks)} failed:\n{text}"
    for rank, process in enumerate(ranks):
        if process.exitcode is not None and process.exitcode < 0:
            return f"rank {rank} of {len(ranks)} died of {signal.Signals(-process.exitcode).name}"
    return None
