"""What ranks say of each other when all are alive and yet a collective fails. tests/distributed/test_rank_death.py has
the ranks that are not."""

from __future__ import annotations

import os
import socket
import subprocess

from moetrain.train.watch import Beat, _state, behind, processes_here


def test_the_rank_that_waits_for_nobody_is_the_one_that_the_others_wait_for() -> None:
    waiting = Beat(9.0, 7, "node-1", 11, "moetrain.train.step:53", waits=True)
    reading = Beat(9.2, 7, "node-2", 12, "moetrain.data.loader:101", waits=False)
    text = behind({0: waiting, 1: waiting, 2: reading})
    assert text.endswith("behind: rank 2 (process 12 on node-2) at moetrain.data.loader:101")


def test_else_the_one_with_the_fewest_steps() -> None:
    ahead = Beat(9.0, 8, "node-1", 11, "moetrain.train.step:53", waits=True)
    late = Beat(9.2, 7, "node-2", 12, "moetrain.parallel.pipeline:80", waits=True)
    assert behind({0: ahead, 1: late}).endswith(
        "behind: rank 1 (process 12 on node-2) at moetrain.parallel.pipeline:80"
    )
    assert behind({0: ahead, 1: ahead}) == "all ranks give signs of life"


def test_a_process_is_dead_only_to_those_who_would_see_it_alive() -> None:
    """Machines that share a name must not take each other's ranks for dead."""
    ended = subprocess.Popen(["true"])
    ended.wait()

    def state(pid: int, processes: str) -> str:
        return _state(Beat(9.0, 7, socket.gethostname(), pid, processes=processes))

    assert state(ended.pid, processes_here()) == "has died"
    assert state(os.getpid(), processes_here()) == "hangs"
    assert state(ended.pid, "another machine") == state(ended.pid, "") == "has died or hangs"
