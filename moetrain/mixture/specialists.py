"""One model per domain from a shared start, for ``MergedModels``."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moetrain.config.errors import DataError, TrainError
from moetrain.config.schema import Config
from moetrain.data.asked import ask, domains_of
from moetrain.data.manifest import Manifest
from moetrain.mixture.shares import settings

LEAN = ["checkpoint.keep=1", "log.tensorboard=false", "log.progress=false", "log.every=50"]


def refuse_short(cfg: Config, manifest: Manifest, domains: Sequence[str], start: int) -> None:
    """Raise DataError where ``max_epochs`` would end the run of a domain alone before ``train.steps``."""
    tokens, domain_of = cfg.train.global_batch * cfg.train.seq_len, domains_of(cfg.data)
    sizes = {name: info.train.tokens for name, info in manifest.domains.items()}
    asked = ask(cfg, sizes)
    if asked.exhausted == "repeat":
        return
    shares = asked.phases[0].weights
    for domain in domains:
        names = [name for name, share in shares.items() if domain_of[name] == domain and share > 0]
        whole, need, left = sum(shares[name] for name in names), {}, {}
        for name in names:
            alone = (cfg.train.steps - start) * shares[name] / whole
            need[name] = (start * shares[name] + alone) * tokens
            left[name] = sizes[name] * (math.inf if (cap := asked.max_epochs[name]) is None else cap)
        short = any(need[name] > left[name] for name in names)
        if short and (asked.exhausted == "stop" or sum(need.values()) > sum(left.values())):
            raise DataError(
                f"proxy=merged trains a model on '{domain}' alone, on {sum(need.values()):,.0f} tokens, and max_epochs "
                "ends it before that; set data.exhausted=repeat, or lower train.steps"
            )


def train_specialists(
    folder: Path,
    cfg: Config,
    words: Sequence[str],
    config_dirs: Sequence[str],
    names: Mapping[str, str],
    prior_D: np.ndarray,
    start: int,
) -> dict[str, Path]:
    """Train ``start`` steps on the prior, then go on from there on each domain alone until ``train.steps``.

    start=0: all begin at the initial weights, which are the same for one seed. words, config_dirs: the settings that
    gave ``cfg``. names: domain -> what sets its weight (``setting_names``). Returns domain -> run directory below
    ``folder``. What is finished is kept. Raises TrainError where a run fails.
    """
    steps = cfg.train.steps
    decay = cfg.schedule.decay_steps or steps  # one learning rate schedule over both parts
    folders = [word for one in config_dirs for word in ("--config-dir", one)]
    first = [*folders, *LEAN, *words, "checkpoint.at_end=true", "export.at_end=false", f"schedule.decay_steps={decay}"]
    shared = folder / "start"
    if start:
        train(shared, start, [*first, f"train.steps={start}", *weight_words(names, prior_D)])
    runs = {}
    for number, domain in enumerate(names):
        run = folder / f"only-{domain}"
        alone = weight_words(names, np.eye(len(names))[number])
        if start and not run.exists():
            partial = folder / f"only-{domain}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(shared, partial)
            (partial / "summary.json").unlink()  # of the start alone
            partial.rename(run)
        last = [*alone, f"train.steps={steps}"]
        train(run, steps, last if start else [*first, *last], again=last)
        runs[domain] = run
    return runs


def train(run: Path, steps: int, words: Sequence[str], again: Sequence[str] | None = None) -> None:
    """Train in ``run`` up to ``steps``, unless it has been; ``again``: settings to go on with."""
    if done(run) >= steps:
        return
    command = [sys.executable, "-m", "moetrain.cli", "train"]
    if (run / "config.yaml").is_file():
        command += ["--resume", str(run), *(again or [])]
    else:
        command += [*words, f"run_dir={run}"]
    code = subprocess.run(command).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code or done(run) < steps:
        raise TrainError(f"the model in {run} was not trained, see above; the same command goes on from there")


def done(run: Path) -> int:
    """Steps of a finished run, else 0."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        return int(summary["steps"]) if summary["exit_reason"] == "finished" else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def weight_words(names: Mapping[str, str], weights_D: np.ndarray) -> list[str]:
    """Settings for ``moetrain train``, in the order of ``names``."""
    return ["data.mixture=given", *settings(names, dict(zip(names, weights_D.tolist(), strict=True)))]
