"""Signals by which a cluster takes its machines back: save what there is, and end in a way that asks for more time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from moetrain.config.errors import TrainError
from moetrain.train.exit_codes import REQUEUE

# Slurm sends SIGTERM when a job is preempted and, if asked to, SIGUSR1 ahead of its time limit.
PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)


class Requeue(TrainError):
    """The run was told to stop and can go on later."""

    exit_code = REQUEUE


class Signals:
    """Whether this rank was told to stop. ``number``: the signal's, 0 without one. Until ``ready``, while there is
    nothing to save yet, a signal raises Requeue at once."""

    def __init__(self) -> None:
        self.number = 0
        self.ready = False

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.number = number
        if not self.ready:
            raise Requeue(f"stopped by {signal.Signals(number).name} before its first step; start it again")


@contextmanager
def listening() -> Iterator[Signals]:
    """Take the signals of ``PREEMPTION`` while the body runs. In the main thread."""
    signals = Signals()
    before = {number: signal.signal(number, signals.take) for number in PREEMPTION}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
