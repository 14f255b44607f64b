"""Several ranks of one command on this machine, through torch's elastic agent (what torchrun starts)."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

# Set for the ranks: whoever started them reports the first error of all ranks, once, so they do not print their own.
REPORTED = "MOETRAIN_ERRORS_REPORTED"
# Set for runs that are to end with the process that started them, as those of a sweep.
ENDS_WITH_PARENT = "MOETRAIN_ENDS_WITH_PARENT"
STOPPED_LATE_S = 10  # the agent waits 30 s before it kills a rank that does not heed SIGTERM
REQUEUE = 85  # exit code of ranks that a signal stopped; they leave a message, but are never the cause
NO_FILE = "<N/A>"  # what the agent says of a rank that left no message


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended. code: exit code to pass on; message: the first failing rank's error, "" on success."""

    code: int
    message: str = ""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_ranks(command: Sequence[str], ranks: int, env: Mapping[str, str] | None = None) -> Outcome:
    """Run ``command`` (program and arguments) as ``ranks`` processes that can find each other, and wait for them.

    When one fails, the others are stopped. SIGINT, SIGTERM and SIGUSR1 are passed on to the ranks; those that heed the
    last two have all the time that they need, until there is a second SIGTERM. Changes this process's environment,
    which the ranks inherit.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.update(env or {})
    os.environ[REPORTED] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # the agent would kill after 30 s
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="moetrain-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        with _passing_on() as passed:
            try:
                elastic_launch(config, command[0])(*command[1:])
            except SignalException as stopped:
                return Outcome(128 + stopped.sigval.value, f"stopped by {stopped.sigval.name}")
            except ChildFailedError as error:
                cause = _first_cause(error.failures)
                if passed and cause.code == 128 + passed[0]:
                    return Outcome(cause.code, f"stopped by {passed[0].name}")
                return cause
    return Outcome(0)


@contextmanager
def _passing_on() -> Iterator[list[signal.Signals]]:
    """Pass SIGTERM and SIGUSR1 on to the ranks while the body runs; yields those that came."""
    passed: list[signal.Signals] = []

    def take(number: int, frame: FrameType | None) -> None:
        again = signal.SIGTERM in passed and number == signal.SIGTERM
        passed.append(signal.Signals(number))
        for pid in _ranks_here():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if again else number)

    if threading.current_thread() is not threading.main_thread():
        yield passed
        return
    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ranks_here() -> list[int]:
    """The processes that the agent started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"\0LOCAL_RANK=" in b"\0" + (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def record_error(message: str, code: int) -> None:
    """Called by a rank that fails: leave ``message``, one line, and its exit code for the process that started it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w") as file:
            json.dump({"message": message, "timestamp": str(int(time.time())), "code": code}, file)


def show_error(line: str, code: int) -> None:
    """Show ``line``, or leave it, with the exit code, for the process that started this rank and shows it for all."""
    record_error(line, code)
    if not reports_for_me():
        print(f"moetrain: error: {line}", file=sys.stderr, flush=True)


def end_with_parent() -> None:
    """Called by a rank at its start: let the system end it when the process that started it is gone, however that ends.

    The agent gives every rank a session of its own, so a killed agent would leave ranks behind that go on writing to
    the run directory. Linux only; elsewhere this does nothing.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1:  # it was gone already
            os.kill(os.getpid(), signal.SIGKILL)


def reports_for_me() -> bool:
    """Whether the process that started this rank prints its error."""
    return REPORTED in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ


def _first_cause(failures: Mapping[int, Any]) -> Outcome:
    """The failure to report. A rank that was killed without a word takes its peers down with it, so it comes first;
    then one that left a message; then any other; those that the agent stopped for it, with SIGTERM or long after with
    SIGKILL, come last, but for those that say that a signal stopped them."""
    first = min(failure.timestamp for failure in failures.values())

    def order(item: tuple[int, Any]) -> tuple[int, int]:
        rank, failure = item
        if failure.error_file != NO_FILE:
            return (4 if failure.exitcode == REQUEUE else 1), rank
        stopped_late = failure.exitcode == -signal.SIGKILL and failure.timestamp > first + STOPPED_LATE_S
        if failure.exitcode == -signal.SIGTERM or stopped_late:
            return 3, rank
        return (0 if failure.exitcode < 0 else 2), rank

    rank, failure = min(failures.items(), key=order)
    if failure.error_file != NO_FILE:
        # Its own exit code may have been lost to the signal that stops all ranks.
        with open(failure.error_file) as file:
            return Outcome(json.load(file).get("code", 1), failure.message)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return Outcome(128 - failure.exitcode, f"rank {rank} was ended by {name}; the other ranks were stopped")
    return Outcome(failure.exitcode, f"rank {rank} failed with exit code {failure.exitcode}; see its output above")
