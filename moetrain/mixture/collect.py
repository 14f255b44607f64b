"""From the run directories of a sweep to runs: which mixture each trained on, and its held-out loss per domain."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from moetrain.config import read
from moetrain.config.errors import ConfigError, DataError
from moetrain.data.manifest import Manifest
from moetrain.mixture.runs import Runs
from moetrain.mixture.shares import domain_shares, ran_out, refuse_changes

logger = logging.getLogger("moetrain")


@dataclass(frozen=True)
class Result:
    """One finished run: share of the training tokens that its config asks for, and held-out loss in nats, by domain.
    tokens: that it was trained on. ran_out: sources that it had to do without before its end (``data.max_epochs``)."""

    shares: dict[str, float]
    losses: dict[str, float]
    tokens: int
    ran_out: list[str]

    def warn(self, run: Path) -> None:
        """Say where the loss of ``run`` is not that of its mixture."""
        if self.ran_out:
            logger.warning(
                "%s ran out of %s, so its loss is that of another mixture than its weights; for small runs set "
                "data.exhausted=repeat, or draw mixtures that do not use up a domain (cap=)",
                run, ", ".join(self.ran_out),
            )  # fmt: skip


def collect(sweep: Path) -> Runs:
    """All finished runs of the sweep in ``sweep``, in the order of their names; what is not finished is named.

    Domains are those with a weight above 0 in some run, targets all that were evaluated. Raises DataError: no sweep,
    runs of other domains, weights that change during a run, nothing finished.
    """
    try:
        names = list(yaml.safe_load((sweep / "sweep.yaml").read_text(encoding="utf-8"))["runs"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        raise DataError(f"{sweep}: not a sweep of 'moetrain train -m', it has no sweep.yaml that can be read") from None
    found = {name: read_result(sweep / name) for name in names}
    results = {name: result for name, result in found.items() if result is not None}
    if not results:
        raise DataError(f"{sweep}: none of its {len(names)} runs has finished; see the summary.json of each")
    missing = [name for name in names if name not in results]
    if missing:
        logger.warning("%s: left out, not finished: %s", sweep, ", ".join(missing))
    first_name, first = next(iter(results.items()))
    for name, result in results.items():
        if set(result.losses) != set(first.losses) or set(result.shares) != set(first.shares):
            raise DataError(f"{sweep / name}: has other domains than the first run; collect sweeps of one data set")
        result.warn(sweep / name)
    other = [name for name, result in results.items() if result.tokens != first.tokens]
    if other:
        logger.warning(
            "%s: trained on other numbers of tokens than %s (%d): %s; losses of unequal runs say little about mixtures",
            sweep, first_name, first.tokens, ", ".join(other),
        )  # fmt: skip
    domains = [domain for domain in first.shares if any(result.shares[domain] > 0 for result in results.values())]
    return Runs(
        domains=domains,
        targets=list(first.losses),
        weights=np.array([[result.shares[domain] for domain in domains] for result in results.values()]),
        losses=np.array([[result.losses[target] for target in first.losses] for result in results.values()]),
    )


def read_result(run: Path) -> Result | None:
    """The result of the run in ``run``; None where it has not finished, or its losses are not finite. Raises DataError
    for a run whose weights change, and where the folder of its data is gone."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        losses, reason = summary.get("val_loss_by_domain"), summary["exit_reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if reason != "finished" or not losses or not all(map(math.isfinite, losses.values())):
        return None
    try:
        cfg = read(run / "config.yaml")
        refuse_changes(cfg)
    except ConfigError as error:
        raise DataError(f"{run}: {error}") from None
    manifest = Manifest.load(Path(cfg.data.dir))
    tokens = int(summary.get("tokens", 0))
    return Result(domain_shares(cfg, manifest), losses, tokens, ran_out(cfg, manifest, tokens))
