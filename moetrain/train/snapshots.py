"""Whether a run takes snapshots, how often, and what they are kept under; see ``checkpoint.snapshot``."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.checkpoint import Snapshots
from moetrain.checkpoint.slots import SHARED, Folder, clear, node_of, room
from moetrain.checkpoint.snapshot import local
from moetrain.comm.ranks import Ranks
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config
from moetrain.config.sizes import Sizes
from moetrain.train.engine import Engine

log = logging.getLogger("moetrain")

ID = "snapshot-id"
# With a failure every three hours (Llama 3 on 16,384 GPUs: 419 in 54 days, arXiv 2407.21783) the best interval by
# Young's formula, sqrt(2 x cost x time between failures), is 25 to 150 s where a snapshot costs 0.03 s (the demo, with
# steps of 0.2 s) to 1 s (a large model, with steps of several seconds).
EVERY = 20
SHARE = 0.5  # of the free memory that may be taken without being asked for
COPIES = 4  # two of the own state, so that one is whole at any moment, and two of a neighbour's


class RunSnapshots:
    """The snapshots of a run, or none. every: steps between them, 0 for none. gib: what they take on the node that
    has to give most. why: there are none, or ""."""

    def __init__(self, kept: Snapshots | None, every: int, gib: float, why: str = "") -> None:
        self.kept, self.every, self.gib, self.why = kept, every, gib, why

    def describe(self) -> str:
        """For the run's opening lines."""
        if self.kept is None:
            return f"none: {self.why}"
        return f"every {self.every} steps, in about {self.gib:.2f} GiB of shared memory on a node"

    def take(self, step: int, engine: Engine, progress: dict[str, Any], base: int) -> None:
        """One of the state after ``step`` steps; base: step of the newest checkpoint."""
        assert self.kept is not None
        self.kept.take(step, engine.tensors(), engine.progress(progress), base)

    def forget(self) -> None:
        """The run has ended in a way that needs none."""
        if self.kept is not None:
            self.kept.close(remove=True)


def open_snapshots(cfg: Config, sizes: Sizes, run_dir: Path, engine: Engine) -> RunSnapshots:
    """The run's snapshots. Clears what ended runs have left. Collective.

    Raises ConfigError when ``train.snapshot.every`` asks for more memory than a node has free.
    """
    asked = cfg.train.snapshot.every
    ranks = Ranks()
    if asked == 0 or (asked is None and cfg.parallel.engine == "deepspeed"):
        return RunSnapshots(None, 0, 0.0, "train.snapshot.every=0" if asked == 0 else "DeepSpeed holds the state")
    key = ranks.first(lambda: run_key(run_dir))
    free = ranks.each(lambda: _free(key))
    told = ranks.gather(state_bytes(engine) * (COPIES if ranks.size > 1 else COPIES // 2))
    need: dict[str, int] = defaultdict(int)
    for (node, _), more in zip(free, told, strict=True):
        need[node] += more
    short = [(need[n], left) for n, left in free if need[n] > left * (1 if asked else SHARE)]
    if short:
        want, left = (n / 2**30 for n in short[0])
        line = f"{want:.3g} GiB of a node that has {left:.3g} GiB free in {SHARED}, its memory and its container"
        if asked:
            raise ConfigError(
                f"train.snapshot.every={asked} needs {line}; give it more (docker --shm-size), or set it to 0"
            )
        why = f"they need {line}, of which half may be taken unasked; a lost rank costs up to checkpoint.every steps"
        return RunSnapshots(None, 0, 0.0, why)
    mapping = {**asdict(sizes), "engine": cfg.parallel.engine}
    return RunSnapshots(Snapshots(key, mapping), asked or EVERY, max(need.values()) / 2**30)


def run_key(run_dir: Path) -> str:
    """What the run in ``run_dir`` is called in shared memory: by an id that it keeps there, and by the folder's place,
    so that a copy of the folder is another run."""
    file = run_dir / ID
    if not file.exists():
        file.write_text(f"{uuid.uuid4().hex}\n")
    return hashlib.sha256(f"{file.read_text()}{run_dir.resolve()}".encode()).hexdigest()[:32]


def forget(run_dir: Path) -> None:
    """Remove this node's snapshots of a run that nobody goes on with, unless it lives: then another command was refused
    its folder."""
    if (run_dir / ID).exists():
        clear(run_key(run_dir))


def state_bytes(engine: Engine) -> int:
    """Bytes of this rank's weights and optimizer state: two moments as wide as the weight for each that is trained."""
    buffers = {id(b): b for b in engine.model.buffers()}
    total = sum(_bytes(b) for b in buffers.values())
    return total + sum((3 if p.requires_grad else 1) * _bytes(p) for p in engine.model.parameters())


def _free(key: str) -> tuple[str, int]:
    """(node, bytes that snapshots may take there), those of an earlier life of the run counted as free."""
    if not SHARED.is_dir():
        return "", 0
    folder = Folder(key)
    folder.clear_others()
    return node_of(SHARED), room(SHARED) + folder.size()


def _bytes(value: Tensor) -> int:
    part = local(value)
    return part.numel() * part.element_size()
