"""A planned mapping as a preset that ``moetrain train experiment=NAME`` runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moetrain.config.errors import ConfigError
from moetrain.config.presets import Presets, config_root, parse
from moetrain.planner.placed import fssdp_options
from moetrain.planner.search import Plan, Problem, description


def check_emit(word: str, config_dirs: Sequence[str], words: Sequence[str]) -> Path:
    """The file of ``--emit experiment=NAME``. words: the settings and presets of the plan. Raises ConfigError for
    another word, where the preset exists, and for ``~key``."""
    found = re.fullmatch(r"experiment=([A-Za-z0-9][A-Za-z0-9._-]*)", word)
    if found is None:
        raise ConfigError(f"--emit takes experiment=NAME, of letters, digits, dots and dashes; got '{word}'")
    file = (Path(config_dirs[0]) if config_dirs else config_root()) / "experiment" / f"{found[1]}.yaml"
    if file.exists():
        raise ConfigError(f"--emit {word}: {file} exists; choose another name, or remove it")
    for given in words:
        if given.startswith("~"):
            raise ConfigError(f"--emit {word}: a preset takes nothing out; leave {given} to 'moetrain train'")
    return file


def emit(file: Path, p: Problem, plan: Plan, words: Sequence[str], tokens: float | None) -> None:
    """Write ``file``. words: the settings and presets of the plan."""
    groups, settings = _split(words)
    row, t = plan.row, p.cfg.train
    parallel = {
        "pp": row["pp"], "dp_replicate": row["rep"], "dp_shard": row["dp"], "cp": row["cp"], "tp": row["tp"],
        "ep": row["ep"], "etp": row["etp"], "schedule": row["schedule"], "offload": row["offload"],
    }  # fmt: skip
    if row["pp"] > 1:
        parallel["stages_per_rank"] = row["vpp"]
    if row["cp"] > 1:
        parallel["context"] = row["context"]
    train = {
        "seq_len": t.seq_len, "global_batch": t.global_batch, "micro_batch": row["micro_batch"],
        "recompute": row["recompute"], "precision": t.precision,
    }  # fmt: skip
    if tokens is not None:
        train["steps"] = max(1, round(tokens / p.tokens))
    tree: dict[str, Any] = {"launch": {"ranks": p.world}, "parallel": parallel, "train": train}
    if row["precision"] == "fp8":
        tree["experts"] = {"fp8": True}
    if row["placement"] == "fssdp":
        node_size = dict(fssdp_options(p.cfg, p.cluster.domain))["node_size"]
        tree.setdefault("experts", {})["placement"] = {"node_size": node_size}
    chosen = {"dispatch": row["dispatch"], "experts/placement": row["placement"]}
    for name, value in chosen.items():  # settings of another choice do not go with this one
        if groups.get(name, value) != value:
            settings = {k: v for k, v in settings.items() if not k.startswith(name.replace("/", ".") + ".")}
    for key, value in settings.items():
        _lay(tree, key, value)
    groups |= chosen
    defaults = [{f"override /{name}": value} for name, value in groups.items()]
    if row["dispatch"] == "two_step":
        tree["dispatch"] = {"node_size": max(1, p.cluster.domain // row["etp"])}
    text = (
        "# @package _global_\n"
        f"# By 'moetrain plan' for {p.world} x {p.cluster.name}: {description(row)}.\n"
        f"# Predicted: {plan.tokens:,.0f} tokens/s/GPU, {plan.seconds:.3g} s a step, {plan.total / 2**30:.1f} GiB.\n"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + yaml.safe_dump({"defaults": defaults, **tree}, sort_keys=False, width=110))


def _split(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(presets, settings) of ``words``."""
    known = Presets.find().groups()
    groups: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for override in parse(words):
        (groups if override.key_or_group in known else settings)[override.key_or_group] = override.value()
    return groups, settings


def _lay(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
    tree.setdefault(last, value)
