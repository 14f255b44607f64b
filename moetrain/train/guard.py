"""Bad steps: a loss or gradient that is not finite, or a loss far above those before it.

What happens to a bad step, after Ling (arXiv 2503.05139, section 3.3; thresholds are ours, see ``FaultsConfig``):

1. It is computed again at once: a flipped bit does not come back, and then the run is what it would have been.
2. Bad again, its update is skipped, and the batch is kept. It is tried once more, as an update between two steps,
   ``retry_after`` steps later. The step counts as done, so all later steps have the samples that they would have had.
3. Bad again, the learning rate is lowered for a while, and at that rate a batch that is only a spike is taken; one that
   is not finite is given up.

After ``stop_after`` batches in a row without a good one the run stops.

Usual is the median of the last ``window`` good losses, give or take their median absolute deviation times 1.4826, which
is the standard deviation of a normal distribution. The window starts anew when the weights of the data change.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from moetrain.config.schema_faults import FaultsConfig
from moetrain.train.step import Accept, StepFigures

log = logging.getLogger("moetrain")

MAD_TO_SIGMA = 1.4826
LEAST_SIGMA = 0.01  # of the median: losses that hardly differ must not make every other one a spike
SPIKE, NOT_FINITE = 1, 2


@dataclass
class Skipped:
    """A batch whose update was skipped. step: 0-based; due: the step before which it is tried again."""

    step: int
    samples: list[int]
    due: int


class Guard:
    """Judges the steps of a run on one rank. ``told``: the number of the signal that this rank was told to stop by, 0
    for none; ``stop``: that of any rank, as of the last step. ``why``: what was wrong with the last bad step.

    skips: False where the engine cannot leave an update out: the first bad step then stops the run.
    """

    def __init__(self, cfg: FaultsConfig, skips: bool) -> None:
        self.cfg, self.skips = cfg, skips
        self.told: Callable[[], int] = lambda: 0
        self.stop = 0
        self.why = ""
        self.losses: list[float] = []
        self.phase = 0
        self.waiting: list[Skipped] = []
        self.in_a_row = 0
        self.low_until = 0
        self._verdict = 0
        self._takes_spikes = False

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate of step ``step``."""
        return self.cfg.lower_lr if step < self.low_until else 1.0

    def begin(self, phase: int) -> None:
        """The next step is of this phase of the data's weights."""
        if phase != self.phase:
            self.phase, self.losses = phase, []

    def due(self, step: int) -> list[Skipped]:
        """Batches to try again before step ``step``; they wait no longer."""
        found = [batch for batch in self.waiting if batch.due <= step]
        self.waiting = [batch for batch in self.waiting if batch.due > step]
        return found

    def attempt(
        self, step: int, samples: list[int], run: Callable[[Accept], StepFigures]
    ) -> tuple[StepFigures, list[dict[str, Any]]]:
        """Step ``step`` on the batch of ``samples``, which ``run`` computes; its figures, and events to log. Check
        ``exhausted`` after it."""
        self._takes_spikes = False
        figures = run(self.accept)
        if not self._verdict:
            return self._good(figures), []
        if not self.skips:
            self.in_a_row = self.cfg.stop_after
            self.why = self._why(figures)
            return figures, []
        self.why = self._why(figures)
        about = {"step": step + 1, "why": self.why, "samples": samples}
        first = figures
        figures = run(self.accept)
        if not self._verdict:
            log.warning("step %d: %s; computed again, it was not", step + 1, about["why"])
            return self._good(figures), [{"event": "computed_again", **about}]
        self.in_a_row += 1
        self.waiting.append(Skipped(step, samples, step + self.cfg.retry_after))
        log.warning("step %d: %s, twice; its update is skipped", step + 1, about["why"])
        return first, [{"event": "skipped", **about, "again_at": step + self.cfg.retry_after + 1}]

    def again(self, batch: Skipped, step: int, run: Callable[[Accept, float], StepFigures]) -> list[dict[str, Any]]:
        """Try ``batch`` once more, before step ``step``; events to log. ``run`` is also given a factor on the learning
        rate."""
        about: dict[str, Any] = {"step": step + 1, "of_step": batch.step + 1, "samples": batch.samples}
        self._takes_spikes = False
        figures = run(self.accept, self.lr_factor(step))
        if not self._verdict:
            self._good(figures)
            log.info("the batch of step %d was tried again and is good", batch.step + 1)
            return [{"event": "retried", **about, "loss": figures.loss}]
        self.in_a_row += 1
        self.low_until = step + self.cfg.lower_lr_steps
        why, taken = self._why(figures), self._verdict == SPIKE
        if taken:
            self._takes_spikes = True
            figures = run(self.accept, self.cfg.lower_lr)
            taken = not self._verdict
            if taken:
                self._remember(figures.loss)
        log.warning(
            "the batch of step %d was tried again: %s; it is %s, and the learning rate is times %g until step %d",
            batch.step + 1, why, "taken" if taken else "given up", self.cfg.lower_lr, self.low_until,
        )  # fmt: skip
        event = "retried_at_lower_lr" if taken else "given_up"
        return [{"event": event, **about, "why": why, "lr_factor": self.cfg.lower_lr, "until": self.low_until}]

    @property
    def exhausted(self) -> bool:
        """Whether the run must stop."""
        return self.in_a_row >= self.cfg.stop_after

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether to update the weights by a gradient of this norm. Collective: what one rank finds bad all do."""
        verdict = 0
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            verdict = NOT_FINITE
        elif not self._takes_spikes and loss > self.most():
            verdict = SPIKE
        flags = torch.tensor([verdict, self.told()])
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._verdict, self.stop = flags.tolist()
        return self._verdict == 0

    def most(self) -> float:
        """The highest loss that is not a spike."""
        if not (self.cfg.spike and self.skips) or len(self.losses) < self.cfg.window:
            return math.inf
        middle = median(self.losses)
        deviation = MAD_TO_SIGMA * median([abs(loss - middle) for loss in self.losses])
        return middle + self.cfg.spike * max(deviation, LEAST_SIGMA * abs(middle))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: all that later decisions depend on."""
        own = ("losses", "phase", "in_a_row", "low_until")
        return {**{name: getattr(self, name) for name in own}, "waiting": [asdict(batch) for batch in self.waiting]}

    def load_state(self, state: dict[str, Any], global_batch: int) -> None:
        """Take up what ``state`` gave. A batch that waits is forgotten where steps have another number of samples."""
        self.losses, self.phase = list(state["losses"]), state["phase"]
        self.in_a_row, self.low_until = state["in_a_row"], state["low_until"]
        waiting = [Skipped(**batch) for batch in state["waiting"]]
        self.waiting = [batch for batch in waiting if len(batch.samples) == global_batch]
        for batch in waiting:
            if batch not in self.waiting:
                log.warning("the batch of step %d is not tried again: train.global_batch was changed", batch.step + 1)

    def _good(self, figures: StepFigures) -> StepFigures:
        self.in_a_row = 0
        self._remember(figures.loss)
        return figures

    def _remember(self, loss: float) -> None:
        self.losses = [*self.losses, loss][-self.cfg.window :]

    def _why(self, figures: StepFigures) -> str:
        if self._verdict == SPIKE:
            return f"loss {figures.loss:.4g} is above {self.most():.4g}"
        name, value = ("gradient norm", figures.grad_norm) if math.isfinite(figures.loss) else ("loss", figures.loss)
        return f"{name} is {value}"
