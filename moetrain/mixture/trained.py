"""The proxy of RegMix and CLIMB: a small model trained on each mixture, as a sweep of ``moetrain train``."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moetrain.config.errors import DataError, TrainError
from moetrain.mixture.collect import read_result
from moetrain.mixture.presets import GROUP, write_presets

logger = logging.getLogger("moetrain")

# What a proxy does not need. Words of the user come after them and win.
LEAN = ["checkpoint.at_end=false", "log.tensorboard=false", "log.progress=false", "log.every=50"]


class TrainedProxies:
    """A ``Runner`` (moetrain.mixture.iterate). names: domain -> what sets its weight (``setting_names``); words:
    settings of the proxy; folder: where everything goes.

    Round n is the sweep in ``folder/round-n``. Finished proxies are kept: a second call trains what is missing, unless
    the next round has begun, since its mixtures were drawn without what failed.
    """

    def __init__(
        self,
        folder: Path,
        names: Mapping[str, str],
        targets: list[str],
        words: Sequence[str],
        config_dirs: Sequence[str],
    ) -> None:
        self.folder, self.names, self.targets = folder, names, targets
        self.domains = list(names)
        self.words, self.config_dirs = list(words), list(config_dirs)

    def sweep_words(self, x_ND: np.ndarray, round_: int) -> list[str]:
        """Write the presets of the round's mixtures; the words after 'moetrain' that train all proxies."""
        presets = self.folder / "presets"
        write_presets(presets, f"r{round_}", self.names, x_ND.tolist())
        folders = [word for folder in (*self.config_dirs, str(presets)) for word in ("--config-dir", folder)]
        chosen = [f"+{GROUP}=glob(r{round_}-*)", f"run_dir={self.folder / f'round-{round_}'}"]
        return ["train", "-m", *folders, *LEAN, *self.words, *chosen]

    def run(self, x_ND: np.ndarray, round_: int) -> np.ndarray:
        sweep = self.folder / f"round-{round_}"
        names = [f"{number:03d}" for number in range(len(x_ND))]
        closed = (sweep / "sweep.yaml").exists() and (self.folder / f"round-{round_ + 1}").exists()
        if not closed and any(read_result(sweep / name) is None for name in names):
            self.train(sweep, self.sweep_words(x_ND, round_))
        return np.array([self.losses_of(sweep / name, row) for name, row in zip(names, x_ND, strict=True)])

    def train(self, sweep: Path, words: list[str]) -> None:
        """Run the sweep, or what is missing of it. Proxies may fail; raises TrainError where none can run."""
        if (sweep / "sweep.yaml").exists():
            words = ["train", "-m", "--resume", str(sweep)]
        code = subprocess.run([sys.executable, "-m", "moetrain.cli", *words]).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code not in (0, 1):
            raise TrainError(f"the proxies of {sweep} were not trained, see above; the same command goes on from there")

    def losses_of(self, run: Path, weights_D: np.ndarray) -> list[float]:
        """The losses of one proxy, NaN where it failed. Raises DataError where it was trained on another mixture."""
        result = read_result(run)
        if result is None:
            logger.warning("%s did not finish and is left out", run)
            return [float("nan")] * len(self.targets)
        for domain, weight in zip(self.domains, weights_D, strict=True):
            if abs(result.shares.get(domain, 0.0) - weight) > 1e-5:
                raise DataError(f"{run} was trained on another mixture than is asked for now; choose another folder")
        result.warn(run)
        return [result.losses[target] for target in self.targets]
