"""Replays a routing trace under ways to place and send experts: step time, exposed communication, bytes, memory.

Policies are those that training uses (``moe.placement``), fed as training feeds them: with the loads of finished steps.
A step is one micro-batch. For each MoE layer, forward: attention and what else is dense, with the layer's copies of
experts under way behind it; dispatch; the experts, as long as the busiest rank; combine. Backward is twice the
arithmetic and the same exchanges; gradients of copies travel behind the dense part's backward. What does not hide is
"exposed". Rates are those of ``replay_time``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moetrain.moe.placement import Policy, build_policy
from moetrain.moe.placement.plan import WINDOW, Homes, Placement, Topology, ep_homes, predict, routes
from moetrain.planner.replay_time import Clock, copies_sent
from moetrain.planner.trace import Trace

# Bytes of a trained number: weight, gradient and Adam's state, whether all in float32, or bf16 with a float32 master.
STATE = 16
# Times that dispatch=lsh reads or writes a row beside plain dispatch: hash, mean, distances, adding them; and backward.
LSH_PASSES = 8


@dataclass(frozen=True)
class Work:
    """One MoE layer and the dense part before it, on one rank. Bytes of rows and weights in the run's precision.

    row_bytes: of a token's vector. expert: parameters of one expert. dense_flops, dense_bytes: forward, of this rank's
    tokens: arithmetic, and what is read and written in memory besides.
    """

    row_bytes: int
    expert: int
    width: int
    dense_flops: float
    dense_bytes: float = 0.0

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert, as they travel."""
        return self.expert * self.width


@dataclass(frozen=True)
class Model:
    """layers: MoE layers in order. tokens: of a rank and step. top_k: experts per token. experts: of a layer. dense:
    parameters outside of the routed experts. head_flops: forward, of this rank's tokens, after the last layer."""

    layers: list[Work]
    tokens: int
    top_k: int
    experts: int
    dense: int
    head_flops: float


@dataclass(frozen=True)
class System:
    """A way to run the experts. policy: options of ``experts.placement``. sent: share of rows that travel and are
    computed (dispatch=lsh). hidden: copies travel behind dense work; else they are waited for. direct: see
    ``Clock.direct``."""

    name: str
    policy: dict[str, Any] = field(default_factory=lambda: {"kind": "ep"})
    sent: float = 1.0
    hidden: bool = True
    direct: bool = False


@dataclass
class Figures:
    """Means over the steps; seconds of a step, bytes of all ranks in a step.

    rows_s: exchanges of rows; experts_s: the busiest ranks' experts; dense_s: all else that computes. copies_s, of it
    exposed_copies_s: copies' weights and gradients; moved_s: experts that change home. memory: of the fullest rank:
    weights, gradients and optimizer, with copies.
    """

    rows_s: float = 0.0
    experts_s: float = 0.0
    dense_s: float = 0.0
    copies_s: float = 0.0
    exposed_copies_s: float = 0.0
    moved_s: float = 0.0
    rows_bytes: float = 0.0
    copies_bytes: float = 0.0
    moved_bytes: float = 0.0
    memory: float = 0.0

    @property
    def exposed_s(self) -> float:
        """Communication that nothing hides."""
        return self.rows_s + self.exposed_copies_s + self.moved_s

    @property
    def step_s(self) -> float:
        """The step."""
        return self.exposed_s + self.experts_s + self.dense_s


def replay(trace: Trace, model: Model, system: System, clock: Clock, warm_up: int = WINDOW) -> Figures:
    """The figures of ``system`` on ``trace``, whose ranks are those of ``clock``. warm_up: first steps that only teach
    the policy, which then may move homes, at a cost spread over the steps between two such moves; at least one step
    counts."""
    state = _State(model, system, clock)
    warm_up = min(warm_up, len(trace.steps) - 1)
    total = Figures()
    for i, (step, counts_LRE) in enumerate(zip(trace.steps, trace.counts_SLRE, strict=True)):
        if i == warm_up:
            total = _scaled(state.rehome(0), (len(trace.steps) - warm_up) / state.every)
        if i >= warm_up:
            _add(total, state.step(counts_LRE))
        moved = state.learn(step, counts_LRE)
        if i >= warm_up:
            _add(total, moved)
    return _scaled(total, 1 / (len(trace.steps) - warm_up))


class _State:
    """Where experts live, and what of the past a policy is told."""

    def __init__(self, model: Model, system: System, clock: Clock) -> None:
        self.model, self.system, self.clock = model, system, clock
        self.policy: Policy = build_policy(system.policy, clock.ranks)
        self.homes: list[Homes] = [ep_homes(model.experts, clock.ranks) for _ in model.layers]
        self.history: list[list[list[int]]] = [[] for _ in model.layers]
        options = self.policy.options
        self.every = getattr(options, "reshard_every", 0) or getattr(options, "every", 0) or 1

    def step(self, counts_LRE: np.ndarray) -> Figures:
        """One step."""
        m, clock = self.model, self.clock
        figures = Figures(dense_s=3 * clock.compute(m.head_flops))
        placements = []
        for work, homes, history, counts_RE in zip(m.layers, self.homes, self.history, counts_LRE, strict=True):
            planned = self.policy.place(homes, predict(history, m.experts))
            placement = planned
            if self.policy.calibrates:
                placement = self.policy.calibrate(homes, planned, counts_RE.tolist())
            placements.append(placement)
            self._rows(figures, work, placement, counts_RE)
            self._copies(figures, work, homes, planned, placement)
        figures.memory = self._memory(placements)
        return figures

    def learn(self, step: int, counts_LRE: np.ndarray) -> Figures:
        """After ``step`` steps: remember the last one's loads, and move homes where the policy says so; what that
        took."""
        for history, loads_E in zip(self.history, counts_LRE.sum(1).tolist(), strict=True):
            history.append(loads_E)
            del history[:-WINDOW]
        return self.rehome(step)

    def rehome(self, step: int) -> Figures:
        """Move homes, if the policy does so after ``step`` steps."""
        figures = Figures()
        predicted = [predict(history, self.model.experts) for history in self.history]
        new = self.policy.rehome(step, list(self.homes), predicted)
        for work, before, after in zip(self.model.layers, self.homes, new, strict=True):
            moved = copies_sent(before, tuple((home,) for home in after), self.clock.ranks) * work.expert * STATE
            figures.moved_bytes += float(moved.sum())
            figures.moved_s += self.clock.exchange(moved) if moved.any() else 0.0
        self.homes = new
        return figures

    def _rows(self, figures: Figures, work: Work, placement: Placement, counts_RE: np.ndarray) -> None:
        """Computation of a layer, and its exchanges of rows."""
        system, clock = self.system, self.clock
        sent_RRE = rows_sent(counts_RE, placement, self.policy.topology, system.sent)
        bytes_RR = sent_RRE.sum(2) * work.row_bytes
        # Dispatch and combine, then their gradients.
        figures.rows_s += 2 * clock.exchange(bytes_RR) + 2 * clock.exchange(bytes_RR.T)
        figures.rows_bytes += 4.0 * float(bytes_RR.sum() - np.trace(bytes_RR))
        figures.experts_s += 3 * clock.compute(2.0 * work.expert * float(sent_RRE.sum((0, 2)).max()))
        figures.dense_s += 3 * dense_seconds(work, clock)
        if system.sent < 1:
            figures.dense_s += clock.memory(LSH_PASSES * float(counts_RE.sum(1).max()) * work.row_bytes)

    def _copies(self, figures: Figures, work: Work, homes: Homes, planned: Placement, placement: Placement) -> None:
        """Copies of a layer. planned: those that may travel ahead; the others wait for the real loads."""
        system, clock, frees = self.system, self.clock, self.policy.frees
        time = clock.direct if system.direct else clock.broadcast
        late = tuple(tuple({*p} - {*q}) for p, q in zip(placement, planned, strict=True))
        there, more, back = (time(homes, p, work.expert_bytes) for p in (planned, late, placement))
        back *= 2 if frees else 1
        copies = int(copies_sent(homes, placement, clock.ranks).sum())
        figures.copies_bytes += float(copies * work.expert_bytes * (3 if frees else 2))
        figures.copies_s += there + more + back
        hides = dense_seconds(work, clock) if system.hidden else 0.0
        figures.exposed_copies_s += max(0.0, there - hides) + more + max(0.0, back - 2 * hides)

    def _memory(self, placements: list[Placement]) -> float:
        """Copies' weights live from forward to backward, or in one layer at a time; their gradients in one layer."""
        m, R = self.model, self.clock.ranks
        own_LR, copies_LR = np.zeros((len(m.layers), R)), np.zeros((len(m.layers), R))
        for i, (work, homes, placement) in enumerate(zip(m.layers, self.homes, placements, strict=True)):
            own_LR[i] = np.bincount(homes, minlength=R) * work.expert * STATE
            copies_LR[i] = copies_sent(homes, placement, R).sum(0) * work.expert_bytes
        weights_R = copies_LR.max(0) if self.policy.frees else copies_LR.sum(0)
        return float((m.dense * STATE + own_LR.sum(0) + weights_R + copies_LR.max(0)).max())


def dense_seconds(work: Work, clock: Clock) -> float:
    """Forward of a layer's dense part."""
    return clock.compute(work.dense_flops) + clock.memory(work.dense_bytes)


def rows_sent(counts_RE: np.ndarray, placement: Placement, topology: Topology, share: float) -> np.ndarray:
    """Rows that each rank sends to each rank for each expert, int64 (R, R, E), what stays included. share: of the rows
    of a sender and an expert, rounded up."""
    R, E = counts_RE.shape
    sent_RRE = np.zeros((R, R, E), dtype=np.int64)
    many = [e for e, ranks in enumerate(placement) if len(ranks) > 1]
    one = [e for e, ranks in enumerate(placement) if len(ranks) == 1]
    sent_RRE[:, [placement[e][0] for e in one], one] = counts_RE[:, one]
    if many:  # experts do not depend on each other
        few = tuple(placement[e] for e in many)
        sent_RRE[:, :, many] = routes(counts_RE[:, many].tolist(), few, topology)
    return sent_RRE if share == 1 else np.ceil(sent_RRE * share - 1e-9).astype(np.int64)


def _add(total: Figures, figures: Figures) -> None:
    for name, value in vars(figures).items():
        setattr(total, name, getattr(total, name) + value)


def _scaled(total: Figures, factor: float) -> Figures:
    return Figures(**{name: value * factor for name, value in vars(total).items()})
