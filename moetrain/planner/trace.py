"""Routing traces: how often the tokens of each rank chose each expert, step by step; recorded by a run, or made up.

Shapes: S steps, L MoE layers, R ranks that the tokens are on, E experts (of the layer with the most; others have zeros
there).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetrain.config.errors import ConfigError

FOLDER = "trace"


@dataclass(frozen=True)
class Trace:
    """steps: numbers of the steps, ascending, as metrics count them. layers: numbers of the MoE layers.
    counts_SLRE: int64, the choices."""

    steps: list[int]
    layers: list[int]
    counts_SLRE: np.ndarray

    def save(self, file: Path) -> None:
        """Write ``file`` (.npz), whole or not at all."""
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as out:
            np.savez_compressed(
                out, steps=np.array(self.steps), layers=np.array(self.layers),
                counts_SLRE=self.counts_SLRE.astype(np.uint32),
            )  # fmt: skip
        temporary.replace(file)

    def scaled(self, ranks: int, rows: int) -> Trace:
        """The same with ``ranks`` ranks of ``rows`` choices each, in every layer: rank r has the shares of rank r % R,
        rounded to the largest remainder. Where numbers fit, nothing changes."""
        counts = self.counts_SLRE[:, :, np.arange(ranks) % self.counts_SLRE.shape[2]]
        exact = counts * (rows / np.maximum(counts.sum(-1, keepdims=True), 1))
        whole = np.floor(exact + 1e-9).astype(np.int64)
        missing = rows - whole.sum(-1, keepdims=True)
        place = np.argsort(np.argsort(-(exact - whole), axis=-1, kind="stable"), axis=-1, kind="stable")
        return Trace(self.steps, self.layers, whole + (place < missing))

    def skew(self) -> float:
        """Load of the fullest expert over the mean, of all ranks together; mean of steps and layers."""
        loads_SLE = self.counts_SLRE.sum(2)
        return float((loads_SLE.max(-1) / np.maximum(loads_SLE.mean(-1), 1e-12)).mean())


def read_trace(path: Path) -> Trace:
    """The trace in a run directory, in its folder ``trace``, or in one file of it. Where pieces overlap (a run that was
    killed and resumed), each step counts once. Raises ConfigError where there is none, or it cannot be read."""
    files = [path] if path.is_file() else sorted((path / FOLDER).glob("step-*.npz"), key=_number)
    if not files:
        raise ConfigError(f"trace={path} holds no trace; record one with 'moetrain train train.trace=true'")
    rows: dict[int, np.ndarray] = {}
    layers: list[int] = []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as piece:
                steps, found, counts = piece["steps"], piece["layers"].tolist(), piece["counts_SLRE"].astype(np.int64)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ConfigError(f"trace={file} cannot be read as a routing trace: {error}") from None
        same = not rows or next(iter(rows.values())).shape == counts.shape[1:]
        if counts.ndim != 4 or len(steps) != len(counts) or len(found) != counts.shape[1] or not same:
            raise ConfigError(f"trace={file} does not fit the other pieces, or itself; take it away")
        layers = found
        rows.update(zip(steps.tolist(), counts, strict=True))
    if not rows:
        raise ConfigError(f"trace={path} has no step")
    steps = sorted(rows)
    return Trace(steps, layers, np.stack([rows[step] for step in steps]))


def synthetic(steps: int, layers: int, ranks: int, experts: int, rows: int, skew: float, seed: int = 0) -> Trace:
    """A trace of ``rows`` choices on each rank and layer. An expert's popularity is exp(skew * z), z normal, drifting
    from step to step (correlation 0.95), so that the last steps tell much of the next one, on which Hecate (arXiv
    2502.02581) relies. skew=0 is even but for chance."""
    rng = np.random.default_rng(seed)
    z_LE = rng.standard_normal((layers, experts))
    counts = np.zeros((steps, layers, ranks, experts), dtype=np.int64)
    for s in range(steps):
        z_LE = 0.95 * z_LE + (1 - 0.95**2) ** 0.5 * rng.standard_normal(z_LE.shape)
        share_LE = np.exp(skew * z_LE)
        share_LE /= share_LE.sum(1, keepdims=True)
        for layer in range(layers):
            counts[s, layer] = rng.multinomial(rows, share_LE[layer], size=ranks)
    return Trace(list(range(1, steps + 1)), list(range(layers)), counts)


def _number(file: Path) -> int:
    number = file.stem.removeprefix("step-")
    return int(number) if number.isdigit() else 0
