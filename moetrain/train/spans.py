"""Where the time of a step goes: parts of the model and of the step as named spans, timed on logged steps and shown by
name in the traces of torch's profiler.

Spans are put around the functions of a built engine; outside a timed step they only call them.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.config.schema import Config
from moetrain.model.block import Block

log = logging.getLogger("moetrain")


class Spans:
    """The spans of one rank's engine.

    A span's own time is what the spans inside it leave. ``attention`` has its norms and projections; ``router``,
    ``dispatch``, ``experts``, ``combine`` and ``shared`` are the MoE layer's parts, ``other_forward`` embedding, dense
    MLPs, head and loss, ``backward`` all of it but what it computes again, which counts as what it is. ``waiting`` is
    the rest of a step: clipping, sums over ranks, and waiting for them. On a GPU, times are between CUDA events.
    """

    def __init__(self, cfg: Config, engine: Any, device: torch.device, run_dir: Path) -> None:
        p = cfg.train.profile
        self.every = cfg.log.every if p.time_split else 0
        self.steps = set(p.steps) if dist.get_rank() in p.ranks else set()
        self.cuda, self.folder = device.type == "cuda", run_dir / "profile"
        self.timing = self.tracing = False
        self.layer = -1
        self.stack: list[tuple[str, Any]] = []
        self.cuts: list[tuple[str, Any, Any]] = []  # (part, from, to): own time of a span, in pieces
        if self.every or self.steps:
            self._install(engine)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step ``step`` (from 1)."""
        self.timing = self.every > 0 and step % self.every == 0
        self.tracing = step in self.steps
        self.cuts = []
        try:
            if not self.tracing:
                yield
                return
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
            with profile(activities=kinds, acc_events=True) as found:
                yield
            self._save(found, step)
        finally:
            self.timing = self.tracing = False

    def read(self, step_s: float, data_s: float) -> dict[str, dict[str, float]]:
        """``time_split`` of the last step, if it was timed: the share of each part in ``step_s``."""
        if not self.cuts:
            return {}
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for part, start, end in self.cuts:
            seconds[part] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.cuts = []
        seconds["data"] += data_s
        return {"time_split": {part: s / max(step_s, 1e-9) for part, s in seconds.items()}}

    def _install(self, engine: Any) -> None:
        seen: set[int] = set()
        for block in engine.model.modules():
            if not isinstance(block, Block):
                continue
            self._wrap(block, "attend", "attention", block.layer)
            moe: Any = block.moe
            if moe is None:
                continue
            for owner, name, part in ((moe.router, "forward", "router"), (moe.experts, "forward", "experts")):
                self._wrap(owner, name, part)
            self._wrap(moe, "local", "shared")
            if id(moe.dispatcher) not in seen:  # layers share dispatchers
                seen.add(id(moe.dispatcher))
                self._wrap(moe.dispatcher, "dispatch", "dispatch")
                self._wrap(moe.dispatcher, "combine", "combine")
        runner = getattr(engine, "runner", None)
        for part in getattr(runner, "parts", [engine.model]):
            self._wrap(part, "forward", "other_forward")
        for owner, name, part in (
            (engine, "_backward", "backward"),
            (getattr(engine, "optimizer", None), "step", "optimizer"),
            (engine, "train_step", "waiting"),
        ):
            if hasattr(owner, name):
                self._wrap(owner, name, part)

    def _wrap(self, owner: Any, name: str, part: str, layer: int | None = None) -> None:
        """Put a span around ``owner.name``. layer: what spans from here on belong to."""
        inner: Callable[..., Any] = getattr(owner, name)
        in_layer = part not in ("other_forward", "backward", "optimizer", "waiting")

        def spanned(*args: Any, **kwargs: Any) -> Any:
            if not (self.timing or self.tracing):
                return inner(*args, **kwargs)
            if layer is not None:
                self.layer = layer
            if not self.tracing:
                return self._timed(part, inner, args, kwargs)
            with record_function(f"layer {self.layer} {part}" if in_layer else part):
                return self._timed(part, inner, args, kwargs)

        setattr(owner, name, spanned)

    def _timed(self, part: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._now()
        if self.stack:  # the span around this one rests
            outer, since = self.stack[-1]
            self.cuts.append((outer, since, now))
        self.stack.append((part, now))
        try:
            return inner(*args, **kwargs)
        finally:
            end = self._now()
            _, since = self.stack.pop()
            self.cuts.append((part, since, end))
            if self.stack:
                self.stack[-1] = (self.stack[-1][0], end)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _save(self, found: Any, step: int) -> None:
        file = self.folder / f"step-{step}-rank-{dist.get_rank()}.json.gz"
        try:
            self.folder.mkdir(exist_ok=True)
            found.export_chrome_trace(str(file))
            log.info("profile    %s", file)
        except (OSError, RuntimeError) as error:
            log.warning("profile    step %d was not written: %s", step, error)
