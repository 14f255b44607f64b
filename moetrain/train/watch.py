"""Ranks watch each other, so that the loss of one soon ends them all, with a line that names it.

A launcher such as srun may leave the other ranks alone, and all that they meet is "connection closed by peer", from a
neighbour that ended for the same reason, or nothing at all. So a thread of each rank writes a sign of life every second
into the store through which the ranks found each other, and looks there for a verdict: one line that says which rank is
lost. Who meets a failed collective asks for one; who fails by itself leaves its own reason there. Ranks also look at
the signs of life of their two neighbours, for one that is lost while nobody's collective can notice, and at what NCCL
knows of collectives on their GPU, whose failure reaches no Python code.

It costs each rank two or three operations on the store a second, none of which waits. One rank alone is not watched.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import torch.distributed as dist
from moetrain_launch import local

from moetrain.comm.ranks import Ranks, lost_connection, one_line
from moetrain.config.errors import TrainError
from moetrain.train.exit_codes import LOST
from moetrain.train.stacks import Stacks

BEAT_S = 1.0
SILENT_S = 3.0  # once a collective has failed, a rank without a sign of life for so long is the one that is lost
NOBODY_S = 6.0  # once a collective has failed, how long all ranks must give signs of life to be believed
GRACE_S = 1.0  # once there is a verdict, how long the main thread may take to meet it by itself
LEAVE_S = 10.0  # how long the rank that hosts the store stays for the others to read the verdict
SHOWN = 4
VERDICT, INSPECTORS = "verdict", "inspectors"


class LostRank(TrainError):
    """Another rank died, hangs or failed; the text names it."""

    exit_code = LOST


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life. at_s: when, in seconds since the watch began; step: optimizer steps done; at: where in our
    code the main thread is; waits: whether that may be a wait for other ranks; processes: see ``processes_here``."""

    at_s: float
    step: int
    host: str
    pid: int
    at: str = ""
    waits: bool = False
    processes: str = ""


@contextmanager
def watched(timeout_s: float, run_dir: str) -> Iterator[Watch]:
    """Watch over the ranks of the default process group while the body runs. Collective, and so is a good end.

    An error of the body is told to the other ranks, or becomes a LostRank that says which rank was its cause.
    """
    watch = Watch(timeout_s, run_dir)
    if dist.get_world_size() == 1:
        yield watch
        return
    watch.start()
    try:
        yield watch
        watch.end()
    except BaseException as error:
        verdict = watch.failed(error)
        if verdict:
            raise LostRank(verdict) from error
        raise


class Watch:
    """This rank's part in it.

    ``step`` and ``last_good`` tell messages how far the run is: optimizer steps done, path of the newest whole
    checkpoint. Two threads: one alone talks to the store, since that may block when its host hangs; the other ends the
    process when the main thread is stuck where the verdict cannot reach it. With the verdict, each rank that still can
    writes where all its threads are to the run directory: see ``stacks``.
    """

    def __init__(self, timeout_s: float, run_dir: str) -> None:
        self.step: Callable[[], int] = lambda: 0
        self.last_good: Callable[[], str] = lambda: "none"
        self._run_dir = run_dir
        # A rank may stand still for a while (it swaps, say). This is well before collectives give up.
        self._patience_s = max(SILENT_S, timeout_s / 2)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._processes = processes_here()
        self._stacks = Stacks(Path(run_dir) / "stacks", self._rank)
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts_store = self._rank == 0 and not agent
        self._host_of_store = "the launcher of the first node" if agent else "rank 0"
        self._own_error = ""
        self._verdict = ""
        self._asked_s: float | None = None  # since when a verdict is wanted
        self._gpu_gave_up = False
        self._inspects: bool | None = None  # whether finding one is up to this rank
        self._looked_s, self._side = 0.0, -1
        self._turned_s, self._turns = 0.0, 0
        self._trust_s = 0.0  # from when on other ranks' silence means something
        self._wake = threading.Event()
        self._known = threading.Event()  # there is a verdict
        self._may_go = threading.Event()  # nobody needs this process any more
        self._speaks = threading.Lock()  # held by the thread that has the rank's last word; never released
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=f, daemon=True, name="watch") for f in (self._talk, self._guard)]

    def start(self) -> None:
        """Begin. Collective."""
        # A clone, for no other thread may use this connection: operations of one connection wait for each other.
        default: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("moetrain/watch", default.clone())
        self._began = time.monotonic()
        self._beat()  # from here on all ranks have one
        Ranks().gather(None)
        self._began = time.monotonic()  # about the same moment on every rank, so that times can be compared
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """The run went well. Collective."""
        Ranks().gather(None)
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(SILENT_S)
        self._stacks.close()
        Ranks().gather(None)  # the store's host stays until nobody talks to it

    def failed(self, error: BaseException) -> str:
        """The verdict, when ``error`` of the main thread comes from the loss of another rank. "" when it is this
        rank's own; then the others are told."""
        self._speaks.acquire()
        lost = lost_connection(error)
        if lost:
            self._stacks.error = error
            self._asked_s = self._now()
        else:
            self._own_error = one_line(error)
        self._wake.set()
        self._known.wait(NOBODY_S + LEAVE_S)
        self._may_go.wait(LEAVE_S)
        if not lost:
            return ""
        return self._verdict or self._line(f"a collective failed on rank {self._rank}", one_line(error))

    def _now(self) -> float:
        return time.monotonic() - self._began

    # The thread that talks to the store

    def _talk(self) -> None:
        try:
            while not self._ended.is_set() and not self._known.is_set():
                self._turn()
                self._wait(BEAT_S if self._asked_s is None else BEAT_S / 4)
            self._stay()
        except Exception as error:  # the store is gone
            if not self._ended.is_set() and not self._known.is_set():
                what = f"{self._host_of_store}, host of the ranks' store, has died"
                self._decide(self._line(what, one_line(error)))
        self._may_go.set()

    def _wait(self, seconds: float) -> None:
        if self._wake.wait(seconds):
            self._wake.clear()

    def _turn(self) -> None:
        now_s = self._now()
        self._stacks.expect_life(2 * self._patience_s)
        if now_s > self._turned_s + SILENT_S:  # this rank stood still itself, maybe all did: Slurm suspends whole jobs
            self._trust_s = now_s + SILENT_S
        self._turned_s = now_s
        if not self._gpu_gave_up and gpu_gave_up():
            self._gpu_gave_up = True
            self._asked_s = self._asked_s or now_s
        self._beat()
        if self._own_error:
            me = Beat(0, 0, socket.gethostname(), os.getpid())
            self._propose(self._line(f"{_name(self._rank, me)} failed", self._own_error))
        if self._store.check([VERDICT]):
            self._decide(self._store.get(VERDICT).decode())
            self._store.set(f"read/{self._rank}", "")
        elif now_s < self._trust_s:
            pass
        elif self._asked_s is not None:
            self._inspect(self._asked_s)
        elif now_s > self._looked_s + SILENT_S:
            self._looked_s, self._side = now_s, -self._side
            beat = self._beat_of((self._rank + self._side) % self._world)
            silent_s = self._now() - beat.at_s
            # NCCL tells nobody that a process is gone; on the same machine, it can be seen.
            if silent_s > self._patience_s or (silent_s > SILENT_S and _state(beat) == "has died"):
                self._asked_s = now_s
                self._wake.set()
        self._turns += 1

    def _beat(self) -> None:
        at, waits = _place()
        waits = waits or self._gpu_gave_up
        beat = Beat(self._now(), self.step(), socket.gethostname(), os.getpid(), at, waits, self._processes)
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def _beat_of(self, rank: int) -> Beat:
        return Beat(**json.loads(self._store.get(f"beat/{rank}")))

    def _silence(self, rank: int) -> float:
        """Seconds without a sign of life."""
        return self._now() - self._beat_of(rank).at_s

    def _propose(self, line: str) -> None:
        """The first verdict counts: what follows it is its consequence."""
        self._store.compare_set(VERDICT, "", line)

    def _decide(self, line: str) -> None:
        self._verdict = line
        self._stacks.write(line)
        self._known.set()

    def _inspect(self, since_s: float) -> None:
        """Propose a verdict when it can be told which ranks are lost; done by the first rank that wants one."""
        if self._inspects is None:
            self._inspects = self._store.add(INSPECTORS, 1) == 1
        if not self._inspects and self._now() < since_s + NOBODY_S:
            return
        beats = {rank: self._beat_of(rank) for rank in range(self._world)}
        silence = {rank: self._now() - beat.at_s for rank, beat in beats.items()}
        if any(SILENT_S - BEAT_S < seconds <= SILENT_S for seconds in silence.values()):
            return  # it may be lost too
        lost = [rank for rank, seconds in silence.items() if seconds > SILENT_S]
        if lost:
            states = [f"{_name(rank, beats[rank])} {_state(beats[rank])}" for rank in lost[:SHOWN]]
            more = [f"{len(lost) - SHOWN} more"] if len(lost) > SHOWN else []
            seconds = max(silence[rank] for rank in lost)
            self._propose(self._line(", ".join(states + more), f"no sign of life for {seconds:.0f} s"))
        elif self._now() > since_s + NOBODY_S:
            met = f"; rank {self._rank} met: {one_line(self._stacks.error)}" if self._stacks.error else ""
            self._propose(self._line("a collective failed or took too long", behind(beats) + met))

    def _stay(self) -> None:
        """On the store's host: return when all other ranks have read the verdict or are lost themselves."""
        end_s = self._now() + LEAVE_S
        waiting = set(range(self._world)) - {self._rank} if self._hosts_store and self._known.is_set() else set()
        while waiting and self._now() < end_s:
            gone = {r for r in waiting if self._store.check([f"read/{r}"]) or self._silence(r) > SILENT_S}
            waiting -= gone
            time.sleep(BEAT_S / 20)

    # The thread that ends the process

    def _guard(self) -> None:
        before, waits = 0, 0
        while not self._known.wait(BEAT_S):
            if self._ended.is_set():
                return
            # Counted, not timed: this process may have stood still itself
            before, waits = self._turns, waits + 1 if self._turns == before else 0
            if waits * BEAT_S >= self._patience_s:
                what = f"{self._host_of_store}, host of the ranks' store, hangs"
                self._decide(self._line(what, f"no answer for {waits * BEAT_S:.0f} s"))
                self._may_go.set()
        time.sleep(GRACE_S)
        self._may_go.wait(LEAVE_S)
        if not self._speaks.acquire(blocking=False):
            time.sleep(2 * LEAVE_S)  # enough for the main thread to end the process
        # Checkpoints are written to the side and renamed when whole, so this is safe at any instant.
        local.show_error(self._verdict, LOST)
        os._exit(LOST)

    def _line(self, what: str, why: str) -> str:
        return (
            f"{what} after step {self.step()}: {why}; last good checkpoint: {self.last_good()}; "
            f"to go on: moetrain train --resume {quote(str(self._run_dir))}"
        )


def _name(rank: int, beat: Beat) -> str:
    return f"rank {rank} (process {beat.pid} on {beat.host})"


def processes_here() -> str:
    """A name of the processes whose numbers mean something to this one, "" where that cannot be told. Machines may
    share a name, and containers of a machine number their own processes."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state(beat: Beat) -> str:
    """What has become of a silent rank, as far as this machine can tell."""
    if not beat.processes or beat.processes != processes_here():
        return "has died or hangs"
    try:
        gone = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        gone = True
    return "has died" if gone else "hangs"


def _place() -> tuple[str, bool]:
    """Where in our code the main thread is, and whether it may be waiting for other ranks there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    file = frame.f_code.co_filename if frame else ""
    waits = any(part in file for part in ("torch/distributed/", "torch/autograd/", "torch/_ops.py"))
    while frame and not frame.f_globals.get("__name__", "").startswith("moetrain."):
        frame = frame.f_back
    if frame is None:
        return "", waits
    module = frame.f_globals["__name__"]
    return f"{module}:{frame.f_lineno}", waits or module == __name__  # here it waits for a verdict


def gpu_gave_up() -> bool:
    """Whether a collective that this rank's GPU waits for has failed or taken too long.

    The main thread hears nothing of that, wherever it waits for the GPU. NCCL's watchdog notes it, and ends the process
    a minute later (four times TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC) by SIGABRT, without a line.
    """
    gpu = torch.device("cuda")
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    backends = [group._get_backend(gpu) for group in groups if gpu in group._device_types]
    return any(b.get_error().name != "SUCCESS" for b in backends if hasattr(b, "get_error"))


def behind(beats: dict[int, Beat]) -> str:
    """Which ranks the others may be waiting for, all of them being alive."""
    least = min(beat.step for beat in beats.values())
    found = [rank for rank, beat in beats.items() if not beat.waits]
    found = found or [rank for rank, beat in beats.items() if beat.step == least]
    alive = "all ranks give signs of life"
    if len(found) == len(beats):
        return alive
    return f"{alive}; behind: {', '.join(f'{_name(rank, beats[rank])} at {beats[rank].at}' for rank in found[:SHOWN])}"
