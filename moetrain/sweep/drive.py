"""A sweep at work: each run is started, followed by its metrics, stopped where it is bad, and its end is noted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from shlex import quote
from types import FrameType

from moetrain.config import Config
from moetrain.config.errors import ConfigError, TrainError, UserError
from moetrain.config.presets import nearest
from moetrain.sweep.chooser import FULL, PRUNED, Chooser, Trial
from moetrain.sweep.launchers import Handle, Launcher, at_a_time
from moetrain.sweep.metric import Tail
from moetrain.sweep.plan import TRIALS, Sweep, end, exit_reason, load_words
from moetrain.sweep.space import axes, corners
from moetrain.train.lock import locked
from moetrain.train.rundir import keep_config
from moetrain.train.signals import Requeue

POLL_S = 0.2


class Stop(threading.Event):
    """Set by a signal, the number of which it keeps, or by a mistake that makes the rest of the sweep useless."""

    number = 0
    again = False
    error: UserError | None = None

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.again = self.is_set()
        self.number = number
        self.set()


def run_sweep(sweep: Sweep) -> None:
    """Run what has not ended, then say which run was best. A run that fails does not stop the others.

    Raises TrainError: runs failed, now or before; Requeue and KeyboardInterrupt: a signal stopped the sweep;
    ConfigError: the metric is none that runs write, or a launcher that cannot be had here.
    """
    with locked(sweep.folder), _listening() as stop:
        words = next(iter(sweep.runs.values()), None) or next(corners(sweep.space))
        launcher = Launcher(sweep, load_words(words, sweep.config_dirs))
        chooser = Chooser(sweep)
        work = Work(sweep, launcher, chooser, stop)
        at_a_time(sweep.settings.jobs, work.one, chooser.trials(stop))
    if stop.error is not None:
        raise stop.error
    if stop.number:
        line = f"sweep {sweep.folder} stopped; to go on: moetrain train -m --resume {quote(str(sweep.folder))}"
        if stop.number == signal.SIGINT:
            print(line, flush=True)
            raise KeyboardInterrupt
        raise Requeue(line)
    conclude(sweep, chooser)


class Work:
    """What is done for one run. Several threads may be in ``one``."""

    def __init__(self, sweep: Sweep, launcher: Launcher, chooser: Chooser, stop: Stop) -> None:
        self.sweep, self.launcher, self.chooser, self.stop = sweep, launcher, chooser, stop
        self._composing = threading.Lock()  # Hydra composes one config at a time

    def one(self, trial: Trial) -> None:
        """Run ``trial`` to its end, or until the sweep is stopped."""
        run, settings = self.sweep.folder / trial.name, self.sweep.settings
        total = (settings.trials or TRIALS) if self.sweep.adaptive else len(self.sweep.runs)
        print(f"sweep {self.sweep.folder}: run {trial.name} of {total}{varied(self.sweep, trial.name)}", flush=True)
        try:
            with self._composing:
                cfg = self.sweep.config(trial.name)
        except ConfigError as error:
            end(run, f"cannot run: {' '.join(str(error).split())}")
            self.chooser.tell(trial, "cannot run", None)
            return
        tail = Tail(run, settings.metric)
        try:
            if not (run / "config.yaml").is_file():
                keep_config(run, cfg)
            handle = self.launcher.start(run)
        except (ConfigError, OSError) as error:  # no place to write, no job to be had: the same for all runs
            self.stop.error = ConfigError(f"run {run} cannot be started: {error}")
            self.stop.set()
            return
        code, pruned = self.follow(handle, trial, tail, cfg)
        if code == 0:
            if tail.value is None and self.chooser.study is not None:
                self.wrong_metric(trial, tail)
            else:
                self.chooser.tell(trial, exit_reason(run) or FULL[0], tail.value)
        elif pruned:
            end(run, pruned, steps=tail.last.get("step"), tokens=tail.last.get("tokens"))
            print(f"sweep {self.sweep.folder}: run {trial.name} {pruned}", flush=True)
            self.chooser.tell(trial, pruned, tail.value)
        elif not self.stop.is_set():
            self.chooser.tell(trial, exit_reason(run) or f"exit code {code}", None)

    def follow(self, handle: Handle, trial: Trial, tail: Tail, cfg: Config) -> tuple[int, str]:
        """(exit code, why it was pruned) of a run; code -1: it is left at work, the sweep ends without it."""
        pruned, told = "", 0
        while True:
            code = handle.poll()
            for step, value in tail.read():
                bad = self.chooser.heard(trial, step, value)
                if bad and not pruned and code is None and step < cfg.train.steps:
                    s = self.sweep.settings
                    pruned = f"{PRUNED} by {s.prune} at step {step}, {s.metric} {value:.4g}"
                    handle.stop()
            if code is not None:
                return code, pruned
            if self.stop.is_set():
                if handle.outlives:
                    return -1, ""
                if told < 1 + self.stop.again:
                    told += 1
                    handle.stop(at_once=self.stop.again)
                time.sleep(POLL_S)
            else:
                self.stop.wait(POLL_S)

    def wrong_metric(self, trial: Trial, tail: Tail) -> None:
        """End the sweep: a run has finished without the figure that decides."""
        metric = self.sweep.settings.metric
        name, _, inside = metric.partition("/")
        known = sorted(tail.last.get(name, {}) if inside and isinstance(tail.last.get(name), dict) else tail.names)
        self.stop.error = ConfigError(
            f"sweep.metric={metric}: run {trial.name} has finished and wrote no such number; "
            f"{nearest(inside if inside else name, known)}; to go on: moetrain train -m --resume "
            f"{quote(str(self.sweep.folder))} sweep.metric=NAME"
        )
        self.stop.set()


def varied(sweep: Sweep, name: str) -> str:
    """The words of a run that are not those of all, after a colon."""
    keys = {axis.key for axis in axes(sweep.space)}
    last = {word.partition("=")[0]: word for word in sweep.runs[name]}  # a key may be given once for all before
    words = [word for key, word in last.items() if key in keys]
    return f": {' '.join(words)}" if words else ""


def conclude(sweep: Sweep, chooser: Chooser) -> None:
    """Print the best run. Raises TrainError where some failed."""
    folder, settings = sweep.folder, sweep.settings
    values = {}
    for name, reason in chooser.ended.items():
        tail = Tail(folder / name, settings.metric)
        tail.read()
        if reason in FULL and tail.value is not None:
            values[name] = tail.value
    if values:
        best = (min if settings.goal == "min" else max)(values, key=lambda name: values[name])
        print(f"sweep {folder}: best is run {best}, {settings.metric} {values[best]:.4f}{varied(sweep, best)}")
    elif any(reason in FULL for reason in chooser.ended.values()):
        print(f"sweep {folder}: no run has a number called {settings.metric}, so none is best; choose another by "
              f"'moetrain train -m --resume {quote(str(folder))} sweep.metric=NAME'")  # fmt: skip
    print(f"sweep {folder}: for a page about it: moetrain report {quote(str(folder))}", flush=True)
    failed = [name for name, reason in chooser.ended.items() if reason not in FULL and not reason.startswith(PRUNED)]
    if failed:
        raise TrainError(
            f"{len(failed)} of {len(chooser.ended)} runs of the sweep {folder} failed: {', '.join(sorted(failed))}"
        )


@contextmanager
def _listening() -> Iterator[Stop]:
    """Take the signals that stop a sweep while the body runs. In the main thread."""
    stop = Stop()
    taken = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop.take) for number in taken}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
