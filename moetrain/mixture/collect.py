"""From the run directories of a sweep to runs: which mixture each trained on, and its held-out loss per domain."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moetrain.config.errors import DataError
from moetrain.data.dataset import TokenData
from moetrain.mixture.runs import Runs

logger = logging.getLogger("moetrain")


@dataclass(frozen=True)
class Result:
    """One finished run: the weights of its config, the folder of its data, its held-out loss per domain in nats."""

    weights: dict[str, float | None]
    data_dir: str
    losses: dict[str, float]


def collect(sweep: Path) -> Runs:
    """All finished runs of the sweep in ``sweep``, in the order of their names; what is not finished is named.

    Domains are those with a weight above 0 in some run, targets all that were evaluated. Weights that the config leaves
    to the data are shares of its tokens. Raises DataError: no sweep, runs of other domains, nothing finished.
    """
    if not (sweep / "sweep.yaml").is_file():
        raise DataError(f"{sweep}: not a sweep of 'moetrain train -m', it has no sweep.yaml")
    names = list(yaml.safe_load((sweep / "sweep.yaml").read_text(encoding="utf-8"))["runs"])
    found = {name: read_result(sweep / name) for name in names}
    results = {name: result for name, result in found.items() if result is not None}
    if not results:
        raise DataError(f"{sweep}: none of its {len(names)} runs has finished; see the summary.json of each")
    missing = [name for name in names if name not in results]
    if missing:
        logger.warning("%s: left out, not finished: %s", sweep, ", ".join(missing))
    first = next(iter(results.values()))
    for name, result in results.items():
        if set(result.losses) != set(first.losses) or set(result.weights) != set(first.weights):
            raise DataError(f"{sweep / name}: has other domains than the first run; collect sweeps of one data set")
    opened: dict[str, TokenData] = {}
    shares = []
    for result in results.values():
        if any(weight is None for weight in result.weights.values()):
            data = opened.setdefault(result.data_dir, TokenData.open(result.data_dir))
            shares.append(data.weights(result.weights))
        else:
            total = sum(weight or 0.0 for weight in result.weights.values())
            shares.append({domain: (weight or 0.0) / total for domain, weight in result.weights.items()})
    domains = [domain for domain in first.weights if any(share[domain] > 0 for share in shares)]
    return Runs(
        domains=domains,
        targets=list(first.losses),
        weights=np.array([[share[domain] for domain in domains] for share in shares]),
        losses=np.array([[result.losses[target] for target in first.losses] for result in results.values()]),
    )


def read_result(run: Path) -> Result | None:
    """The result of the run in ``run``; None where it has not finished, or its losses are not finite."""
    try:
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        data = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    losses = summary.get("val_loss_by_domain")
    if summary.get("exit_reason") != "finished" or not losses or not all(map(math.isfinite, losses.values())):
        return None
    return Result({name: source["weight"] for name, source in data["sources"].items()}, data["dir"], losses)
