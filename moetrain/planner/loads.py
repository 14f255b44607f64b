"""How unevenly experts are loaded: from a run's ``loads.jsonl``, or by a Zipf law; and what that does to the ranks."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetrain.config.errors import ConfigError
from moetrain.config.schema import ModelConfig
from moetrain.planner.candidates import Numbers

# Share of the rows that dispatch=lsh sends with its six hashes, as measured on the demo (docs/moe.md).
SENT = 0.28
DRAWS = 200  # of a Zipf law: experts in random order over the ranks


@dataclass(frozen=True, eq=False)
class Load:
    """share_NLE: of each of N samples and L layers, the share of each expert's rows in all. name: where it is from.
    steady: samples are worlds of their own, each with loads that stand still; else they follow each other."""

    name: str
    share_NLE: Numbers
    steady: bool = False

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one load lives as long as the command
    def slowest(self, ep: int) -> float:
        """Rows of a layer's fullest rank over the mean, for ep ranks; mean of layers and samples."""
        return float(self._ranks(ep).max(axis=2).mean())

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def fullest(self, ep: int) -> Numbers:
        """Of each sample, rows of all layers on the fullest rank, over the mean: what its memory has to hold."""
        found: Numbers = self._ranks(ep).mean(axis=1).max(axis=1)
        return found

    def _ranks(self, ep: int) -> Numbers:
        N, L, E = self.share_NLE.shape
        ranks: Numbers = self.share_NLE.reshape(N, L, ep, E // ep).sum(axis=3) * ep
        return ranks


def zipf(model: ModelConfig, power: float) -> Load:
    """The n-th most chosen expert of a layer is chosen n^-power times as often as the first; none more often than once
    a token. In each draw and layer experts stand in random order."""
    layers = model.moe_layers()
    E, k = model.layer_value("num_experts", layers[0]), model.layer_value("top_k", layers[0])
    share = np.arange(1, E + 1) ** -float(power)
    share /= share.sum()
    while share.max() > 1 / k + 1e-12:  # what is over goes to the others in proportion
        full = share >= 1 / k
        share = np.where(full, 1 / k, share * (1 - full.sum() / k) / share[~full].sum())
    rng = np.random.default_rng(0)
    order = rng.random((DRAWS, len(layers), E)).argsort(axis=2)
    return Load(f"Zipf {power:g}", share[order], steady=True)


def read_trace(path: Path, model: ModelConfig) -> Load:
    """The loads in a run directory, or a file like its ``loads.jsonl``; each line is a sample. Raises ConfigError."""
    file = path / "loads.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        samples = [list(line["counts"].values()) for line in lines]
    except OSError as error:
        raise ConfigError(f"trace {file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"trace {file} is not a loads.jsonl of a run: {error!r}") from error
    if not samples:
        raise ConfigError(f"trace {file} is empty; a run writes a line after its first steps")
    layers = model.moe_layers()
    expected = [model.layer_value("num_experts", i) for i in layers]
    for sample in samples:
        found = [len(counts) for counts in sample]
        if found != expected:
            other = next((f"{f} experts for {e}" for f, e in zip(found, expected, strict=False) if f != e), "")
            which = f", with {other}," if other else ""
            raise ConfigError(
                f"trace {file} has {len(found)} MoE layers{which} where model {model.name} has "
                f"{len(expected)} of {expected[0] if expected else 0} experts; give a trace of this model"
            )
    if len(set(expected)) > 1:
        raise ConfigError(f"trace {file}: layers with different numbers of experts cannot be planned by a trace yet")
    counts_NLE = np.array(samples, dtype=float)
    totals = counts_NLE.sum(axis=2, keepdims=True)
    if (totals <= 0).any():
        raise ConfigError(f"trace {file} has a layer without a single row")
    return Load(f"trace {file}", counts_NLE / totals)


def probability(fullest_N: Numbers, balanced: float, slope: float, capacity: float) -> float:
    """Share of N samples in which a rank's memory exceeds ``capacity``: ``balanced`` bytes, and ``slope`` more for
    each unit by which its rows exceed the mean (``fullest_N`` times that)."""
    need = balanced + slope * (fullest_N - 1.0)
    return float(np.mean(need > capacity))
