"""Which runs a sweep makes, and which of them it stops early. Optuna (arXiv 1907.10902) does both.

Nothing is kept beside the run directories: going on with a sweep, what its runs wrote is told to a new study. The n-th
draw is seeded by (sweep.seed, n), so that a sweep by chance is the same however often it was stopped.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moetrain.sweep.metric import Tail
from moetrain.sweep.plan import TRIALS, Sweep, exit_reason, load_words
from moetrain.sweep.space import Axis, axes, corners

if TYPE_CHECKING:
    import optuna

PRUNED = "pruned"  # how the exit reason of a run begins that was stopped early
FULL = ("finished", "the data has run out")


@dataclass(frozen=True)
class Trial:
    """A run to make. asked: Optuna's side of it, where Optuna is in use."""

    name: str
    words: list[str]
    asked: Any = None


class Chooser:
    """Chooses runs, is told how they go, and says which to stop."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        settings = sweep.settings
        self.axes = axes(sweep.space) if sweep.adaptive else []
        self.study: optuna.Study | None = None
        self.ended = {name: reason for name in sweep.runs if (reason := exit_reason(sweep.folder / name)) is not None}
        if sweep.adaptive or settings.prune != "none":
            self.study = self._open()
            for name, reason in self.ended.items():
                self._replay(name, reason)

    def trials(self, stop: threading.Event) -> Iterator[Trial]:
        """The runs of the sweep that have not ended, then new ones; each is chosen when it is asked for."""
        for name, words in list(self.sweep.runs.items()):
            if name not in self.ended and not stop.is_set():
                yield Trial(name, words, self._ask(words))
        while self.sweep.adaptive and len(self.sweep.runs) < (self.sweep.settings.trials or TRIALS):
            if stop.is_set():
                return
            name = f"{len(self.sweep.runs):03d}"
            asked = self._ask()
            self.sweep.runs[name] = [
                part.word(asked.params[part.key]) if isinstance(part, Axis) else part for part in self.sweep.space
            ]
            self.sweep.save()
            yield Trial(name, self.sweep.runs[name], asked)

    def heard(self, trial: Trial, step: int, value: float) -> bool:
        """Take an intermediate value; whether the run is to be stopped."""
        if trial.asked is None:
            return False
        trial.asked.report(value, step)
        return bool(trial.asked.should_prune())

    def tell(self, trial: Trial, reason: str, value: float | None) -> None:
        """Take how a run ended."""
        self.ended[trial.name] = reason
        if self.study is None:
            return
        from optuna.trial import TrialState

        if value is not None and reason in FULL:
            self.study.tell(trial.asked, value)
        else:
            self.study.tell(trial.asked, state=TrialState.PRUNED if reason.startswith(PRUNED) else TrialState.FAIL)

    def _replay(self, name: str, reason: str) -> None:
        words = self.sweep.runs[name]
        trial, tail = Trial(name, words, self._ask(words)), Tail(self.sweep.folder / name, self.sweep.settings.metric)
        for step, value in sorted(tail.read()):
            self.heard(trial, step, value)
        self.tell(trial, reason, tail.value)

    def _ask(self, words: list[str] | None = None) -> Any:
        """A trial of Optuna's, of what it chooses or of ``words``; None without Optuna."""
        if self.study is None:
            return None
        if words is not None and self.axes:
            self.study.enqueue_trial({axis.key: axis.drawn(words) for axis in self.axes})
        elif self.axes:
            self.study.sampler = self._sampler(len(self.sweep.runs))
        return self.study.ask({axis.key: axis.distribution() for axis in self.axes})

    def _open(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        direction: Literal["minimize", "maximize"] = "minimize" if self.sweep.settings.goal == "min" else "maximize"
        return optuna.create_study(direction=direction, sampler=self._sampler(0), pruner=self._pruner())

    def _pruner(self) -> optuna.pruners.BasePruner:
        from optuna import pruners

        settings = self.sweep.settings
        if settings.prune == "none":
            return pruners.NopPruner()
        after = settings.prune_after
        if after is None:
            words = next(iter(self.sweep.runs.values()), None) or next(corners(self.sweep.space))
            after = max(1, load_words(words, self.sweep.config_dirs).train.steps // 4)
        if settings.prune == "median":
            return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=after)
        return pruners.SuccessiveHalvingPruner(min_resource=after, reduction_factor=3)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        from optuna.samplers import RandomSampler, TPESampler

        settings = self.sweep.settings
        seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
        if settings.sampler != "tpe":
            return RandomSampler(seed=seed)
        by_chance = min(10, max(4, (settings.trials or TRIALS) // 4))
        return TPESampler(seed=seed, n_startup_trials=by_chance, constant_liar=settings.jobs > 1)
