"""``moetrain mixture search=DIR``: mixtures, proxies, a fit, a proposal; kept in DIR, and taken up again from there."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console

from moetrain.config import load
from moetrain.config.check import check_mapping
from moetrain.config.check_mapping import refuse_nodes
from moetrain.config.errors import ConfigError, DataError
from moetrain.convert.open import brings
from moetrain.data.asked import domains_of
from moetrain.data.dataset import TokenData
from moetrain.data.prepare import prepare
from moetrain.mixture.extra import need
from moetrain.mixture.iterate import Plan, Runner
from moetrain.mixture.iterate import search as search_in_rounds
from moetrain.mixture.merged import MergedModels
from moetrain.mixture.plot import check_plot
from moetrain.mixture.presets import GROUP, write_preset
from moetrain.mixture.report import last_line, show_plot, show_proposal, show_scores
from moetrain.mixture.runs import Runs, find_target, write_runs
from moetrain.mixture.sampling import sample
from moetrain.mixture.shares import domain_shares, refuse_changes, setting_names
from moetrain.mixture.specialists import refuse_short, train_specialists
from moetrain.mixture.study import cross_validated, score
from moetrain.mixture.trained import TrainedProxies
from moetrain.mixture.words import Asked

FILE = "search.yaml"


def search(asked: Asked, config_dirs: Sequence[str], console: Console) -> None:
    """Do it. Raises ConfigError and DataError before anything is trained, TrainError for proxies that fail."""
    began = time.monotonic()
    for package in ("scipy", "lightgbm", "matplotlib"):
        need(package)
    folder = Path(asked.where)
    words = [*asked.settings, f"seed={asked.seed}"]
    cfg = load(words, config_dirs=config_dirs, check=lambda cfg: check_mapping(cfg, cfg.launch.world), start=brings)
    plot = asked.plot or str(folder / "mixture.png")
    refuse_nodes(cfg)
    refuse_changes(cfg)
    prepare(cfg.data)
    data = TokenData.open(cfg.data.dir, vocab_size=cfg.model.vocab_size, domain_of=domains_of(cfg.data))
    # The shares of the config, by rule or given, or of the tokens. Weight 0: a target only
    prior = {name: share for name, share in domain_shares(cfg, data.manifest).items() if share > 0}
    if len(prior) < 2:
        raise DataError(f"search={folder}: the data has {len(prior)} domain to train on; a mixture needs two")
    names, prior_D = setting_names(cfg.data, list(prior)), np.array(list(prior.values()))
    target = find_target(asked.target, data.domains)
    plan = Plan(asked.runs, target, asked.predictor, asked.cap, asked.draws, asked.seed)
    first = sample(prior_D, asked.runs[0], asked.seed, asked.cap)
    if asked.plot:
        check_plot(plot)
    start = cfg.train.steps // 2 if asked.start is None else asked.start
    specialists = None if asked.proxy == "trained" else given_models(asked, list(names), cfg.train.steps)
    if specialists == {}:
        refuse_short(cfg, data.manifest, list(names), start)
    claim(folder, asked, words, data.manifest.fingerprint)
    trained = TrainedProxies(folder, names, data.domains, words, config_dirs)
    if not asked.run:
        write_runs_to_come(folder, trained, first)
        return
    runner: Runner = trained
    if specialists is not None:
        if not asked.models:
            specialists = train_specialists(folder / "merged", cfg, words, config_dirs, names, prior_D, start)
        runner = MergedModels(cfg, specialists, data.domains, folder / "scores.jsonl")
    runs, found, _ = search_in_rounds(runner, prior_D, plan, lambda runs: write_runs(folder, runs))
    predicted = cross_validated(runs, asked.seed, [asked.predictor])
    scores = score(predicted, runs)
    title = f"on {len(runs.weights)} runs, each predicted from others (cross-validation)"
    show_scores(console, scores, title)
    weights = show_proposal(console, names, found, target, asked.predictor)
    write_preset(folder / "presets", "best", names, weights)
    print(f"or: --config-dir {folder / 'presets'} +{GROUP}=best")
    mine = Runs(runs.domains, runs.targets, runs.weights, predicted[asked.predictor])
    show_plot(plot, f"{asked.predictor}, {title}", mine.of(target), runs, found, target)
    last_line(
        target, asked.predictor, weights, found, proxy=asked.proxy, rounds=list(asked.runs),
        runs=len(runs.weights), best_run=best_run(runs, target), spearman=scores, csv=str(folder),
        seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip


def best_run(runs: Runs, target: str) -> dict[str, object]:
    """The mixture with the lowest loss among those that were tried."""
    at = int(np.argmin(runs.of(target)))
    shares = {domain: round(float(weight), 4) for domain, weight in zip(runs.domains, runs.weights[at], strict=True)}
    return {"loss": float(runs.of(target)[at]), "weights": shares}


def claim(folder: Path, asked: Asked, words: Sequence[str], data: str) -> None:
    """Note in ``folder`` what the search is about. Raises ConfigError where it holds another search, or other files.

    data: its fingerprint. More rounds may be added, and what only concerns the proposal may change.
    """
    about = {
        "proxy": asked.proxy,
        "cap": asked.cap,
        "start": asked.start,
        "models": asked.models,
        "data": data,
        "settings": sorted(words),
    }
    if len(asked.runs) > 1:
        about |= {"target": asked.target, "predictor": asked.predictor}
    file = folder / FILE
    if file.is_file():
        known = yaml.safe_load(file.read_text(encoding="utf-8"))
        rounds = known.pop("runs")
        for name in about:
            if name in known and known[name] != about[name]:
                raise ConfigError(
                    f"search={folder} was begun with {name}={known[name]}; give the same words to go on, or another "
                    f"folder"
                )
        both = min(len(rounds), len(asked.runs))
        if rounds[:both] != list(asked.runs[:both]):
            raise ConfigError(
                f"search={folder} was begun with runs={','.join(map(str, rounds))}; only further rounds can be added"
            )
        about = known | about
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"search={folder}: the folder holds other files; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{FILE}.tmp")
    temporary.write_text(yaml.safe_dump({"runs": list(asked.runs), **about}, sort_keys=False), encoding="utf-8")
    temporary.replace(file)


def given_models(asked: Asked, domains: Sequence[str], steps: int) -> dict[str, Path]:
    """Domain -> folder of its model, where there are models. Raises DataError: one is missing; ConfigError: start=."""
    if not asked.models:
        if (asked.start or 0) >= steps:
            raise ConfigError(f"start={asked.start}: the shared start must end before train.steps={steps}")
        return {}
    folders = {domain: Path(asked.models) / domain for domain in domains}
    for domain, where in folders.items():
        if not where.is_dir():
            raise DataError(f"models={asked.models}: has no folder '{domain}'; give one for each domain")
    return folders


def write_runs_to_come(folder: Path, trained: TrainedProxies, x_ND: np.ndarray) -> None:
    """run=false: leave the mixtures, and say how to train on them."""
    words = trained.sweep_words(x_ND, 1)
    print(f"{len(x_ND)} mixtures: {folder / 'presets' / GROUP}; train on them, on as many machines as you like, by")
    print(f"moetrain {shlex.join(words)}")
    print("then give the same 'moetrain mixture search=' again without run=false")
