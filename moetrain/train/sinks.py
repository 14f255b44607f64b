"""Where metrics go: metrics.jsonl, the progress bar, TensorBoard and Weights & Biases, all on the rank that writes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from moetrain.config.schema import Config
from moetrain.moe.balance import Loads

log = logging.getLogger("moetrain")


class Sink(Protocol):
    """Takes the metrics of a log step."""

    def write(self, step: int, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Jsonl:
    """``metrics.jsonl``: one object per log step. On resume, lines of steps that will be run again are cut off, and
    those that a machine's crash has damaged. Where none would stay, as there is no checkpoint any more, all are kept
    beside it.

    Lines that cannot be written (disk full) are kept and written with the next one; no line is ever there in part.
    """

    BLOCK = 2**24  # bytes; what a crash has damaged was written in the seconds before it

    def __init__(self, path: Path, resumed_step: int) -> None:
        if resumed_step == 0 and path.exists() and path.stat().st_size:
            n = len(list(path.parent.glob(f"{path.stem}-before-*.jsonl"))) + 1
            path.rename(path.with_name(f"{path.stem}-before-{n}.jsonl"))
        path.touch()
        self._cut(path, resumed_step)
        self._file = path.open("ab", buffering=0)
        self._name = path.name
        self._waiting: list[str] = []

    def _cut(self, path: Path, resumed_step: int) -> None:
        """Read from the end, as much as it takes to find a line that stays: a run of weeks has gigabytes of them."""
        size, span = path.stat().st_size, self.BLOCK
        while True:
            start = max(0, size - span)
            with path.open("rb") as file:
                file.seek(start)
                start += len(file.readline()) if start else 0  # of which the beginning may be missing
                lines = file.read().splitlines(keepends=True)
            if start == 0 or (lines and self._step(lines[0]) <= resumed_step):
                break
            span *= 2
        kept = [line for line in lines if self._step(line) <= resumed_step]
        if kept == lines[: len(kept)]:
            os.truncate(path, start + sum(map(len, kept)))
            return
        temporary = path.with_suffix(".tmp")
        with path.open("rb") as file, temporary.open("wb") as whole:
            shutil.copyfileobj(file, whole)
            whole.truncate(start)
            whole.seek(start)
            whole.writelines(kept)
        temporary.replace(path)

    @staticmethod
    def _step(line: bytes) -> float:
        """Of a line; past all others where it cannot be read, or is not whole."""
        try:
            return float(json.loads(line)["step"]) if line.endswith(b"}\n") else math.inf
        except (ValueError, KeyError, TypeError):
            return math.inf

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(metrics) + "\n")
        whole = self._file.seek(0, os.SEEK_END)
        try:
            data = "".join(self._waiting).encode()
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(whole)
            if len(self._waiting) == 1:
                log.warning("%s cannot be written (%s): its lines wait in memory", self._name, error.strerror)
            return
        self._waiting.clear()

    def close(self) -> None:
        self._file.close()


class Progress:
    """A bar with the important few: loss, learning rate, tokens/s, balance of the experts."""

    def __init__(self, total: int, start: int) -> None:
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        show = {
            "loss": "bad" if metrics["loss"] is None else f"{metrics['loss']:.3f}",
            "lr": f"{metrics['lr']:.1e}",
            "tok/s": f"{metrics['tokens_per_s']:,.0f}",
        }
        if "load_max_over_mean" in metrics:
            show["load"] = f"{metrics['load_max_over_mean']:.2f}"
        self._bar.set_postfix(show, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class TensorBoard:
    """Scalars in ``tensorboard/``; lists (per-layer figures) become one scalar per layer."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder, first = str(run_dir / "tensorboard"), resumed_step + 1
        # Within a second: by default within two minutes, and a killed run lost steps of before its last checkpoint.
        self._writer = SummaryWriter(folder, purge_step=first, flush_secs=1)  # type: ignore[no-untyped-call]

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # All in one event: by add_scalar, one each, a step of 50 numbers took 3.4 ms of a processor, so 0.3 ms.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in flat(metrics).items()]
        events: Any = self._writer.file_writer
        events.add_summary(Summary(value=values), step)

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


class WandB:
    """Weights & Biases; ``auto`` is online with an API key and offline without.

    A run that goes on is the same run there: ``wandb-id`` in the run directory says which, unless WANDB_RUN_ID does.
    Not offline: of two parts with one id, the one that is sent later takes the place of the other (wandb issue 3841).
    """

    def __init__(self, cfg: Config, run_dir: Path, resolved: dict[str, Any]) -> None:
        import wandb

        mode: Any = cfg.log.wandb
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        file = run_dir / "wandb-id"
        keeps = mode == "online" and "WANDB_RUN_ID" not in os.environ
        kept = file.read_text().strip() if keeps and file.exists() else None
        self._run: Any = wandb.init(
            project=cfg.log.wandb_project,
            name=run_dir.name,
            dir=str(run_dir),
            mode=mode,
            config=resolved,
            id=kept,
            resume="allow" if kept else None,
        )
        if keeps and not kept:
            file.write_text(f"{self._run.id}\n")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        if step >= self._run.step:  # one that it has from before a kill it would refuse, with a warning each
            self._run.log(flat(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class LoadLog:
    """``loads.jsonl``: the choices of every expert, summed over stretches of steps, LINES of them in a run."""

    LINES = 400

    def __init__(self, path: Path, resumed_step: int, steps: int) -> None:
        self._lines = Jsonl(path, resumed_step)
        self._every = -(-steps // self.LINES)
        self._sums: dict[str, Tensor] = {}
        self._step = resumed_step

    def count(self, step: int, loads: Loads) -> None:
        """Add the loads of one step; on a GPU nothing waits for them but the line of a stretch."""
        self._step = step
        for name, counts_E in loads.counts.items():
            self._sums[name] = self._sums[name] + counts_E if name in self._sums else counts_E
        if step % self._every == 0:
            self.flush()

    def flush(self) -> None:
        """Write the stretch so far, if it has a step."""
        if self._sums:
            counts = {name: sums_E.tolist() for name, sums_E in self._sums.items()}
            self._lines.write(self._step, {"step": self._step, "counts": counts})
            self._sums = {}

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._lines.close()


class Writer:
    """Hands metrics to every sink, on rank 0; on other ranks it does nothing.

    A sink that fails is dropped with one warning: a tracker must never cost a run.
    """

    def __init__(self, cfg: Config, run_dir: Path, resolved: dict[str, Any], resumed_step: int, rank: int) -> None:
        self._sinks: list[Sink] = []
        self._loads: LoadLog | None = None
        if rank != 0:
            return
        self._loads = LoadLog(run_dir / "loads.jsonl", resumed_step, cfg.train.steps)
        self._sinks.append(Jsonl(run_dir / "metrics.jsonl", resumed_step))
        makers: list[tuple[bool, str, Any]] = [
            (cfg.log.progress, "progress bar", lambda: Progress(cfg.train.steps, resumed_step)),
            (cfg.log.tensorboard, "TensorBoard", lambda: TensorBoard(run_dir, resumed_step)),
            (cfg.log.wandb != "off", "wandb", lambda: WandB(cfg, run_dir, resolved)),
        ]
        for wanted, name, make in makers:
            if wanted:
                try:
                    self._sinks.append(make())
                except Exception as error:
                    log.warning("%s is off: %s", name, error)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Send one log step's metrics (names to numbers, strings, or lists of numbers per MoE layer)."""
        for sink in list(self._sinks):
            try:
                sink.write(step, metrics)
            except Exception as error:
                log.warning("%s stopped: %s; training goes on without it", type(sink).__name__, error)
                self._sinks.remove(sink)

    def count(self, step: int, loads: Loads) -> None:
        """Note the loads of every step."""
        if self._loads is not None:
            self._loads.count(step, loads)

    def close(self) -> None:
        """Close every sink; one that fails at it is named and left."""
        if self._loads is not None:
            self._loads.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                log.warning("%s did not close: %s", type(sink).__name__, error)
        self._sinks.clear()


def flat(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers of ``metrics``, lists and dicts spread out as name/key; of events, how many of each kind."""
    out: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "events":
            value = Counter(event["event"] for event in value)
        elif isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            out.update(flat({f"{name}/{k}": v for k, v in value.items()}))
        elif isinstance(value, int | float):
            out[name] = float(value)
    return out
