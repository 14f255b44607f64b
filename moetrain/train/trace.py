"""Records routing while training (``train.trace``): ``trace/step-N.npz`` of the run directory, read by ``simulate``."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from torch import Tensor

from moetrain.comm.ranks import Ranks
from moetrain.config.schema import ModelConfig
from moetrain.moe.balance import Loads
from moetrain.planner.trace import FOLDER, Trace

log = logging.getLogger("moetrain")

# Steps of a piece at most.
PIECE = 100


class Tracer:
    """Keeps the choices of this rank's tokens until a piece is written: every PIECE steps, and when asked.

    All ranks call ``count`` and ``flush`` alike.
    """

    def __init__(self, cfg: ModelConfig, run_dir: Path) -> None:
        self.layers = cfg.moe_layers()
        self.experts = max((cfg.layer_value("num_experts", i) for i in self.layers), default=0)
        self.folder = run_dir / FOLDER
        self.kept: list[tuple[int, dict[str, Tensor]]] = []

    def count(self, step: int, loads: Loads) -> None:
        """Note the loads of a step that changed the weights. Collective now and then."""
        if loads.counts:
            self.kept.append((step, loads.mine))
        if len(self.kept) >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Write what is kept. Collective. A full disk costs a warning."""
        if not self.kept or not self.layers:
            return
        steps = [step for step, _ in self.kept]
        mine_SLE = np.zeros((len(steps), len(self.layers), self.experts), dtype=np.int64)
        for s, (_, counts) in enumerate(self.kept):
            for name, counts_E in counts.items():
                mine_SLE[s, self.layers.index(int(name.split(".")[1])), : len(counts_E)] = counts_E.cpu().numpy()
        self.kept = []
        counts_SLRE = np.stack(Ranks().gather(mine_SLE), axis=2)

        def write() -> None:
            file = self.folder / f"step-{steps[-1]}.npz"
            try:
                Trace(steps, self.layers, counts_SLRE).save(file)
            except OSError as error:
                log.warning("trace/%s was not written: %s", file.name, error.strerror)

        Ranks().first(write)
