"""``moetrain plan check RUN_DIR``: what was predicted beside what happened."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moetrain.config import read
from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError
from moetrain.planner.candidates import columns, placement_of, precision_of, row_of
from moetrain.planner.cluster import load_cluster
from moetrain.planner.loads import SENT, read_trace
from moetrain.planner.search import Plan, Problem, description, priced, refined

SKIPPED = 2  # first logged lines: warm-up


def run(words: Sequence[str], console: Console, as_json: bool) -> str:
    """Compare, and print. Raises ConfigError."""
    cluster, folders = "this-machine.yaml", []
    for word in words:
        name, equals, value = word.partition("=")
        if name == "cluster" and equals:
            cluster = value
        else:
            folders.append(Path(word))
    if len(folders) != 1:
        raise ConfigError("plan check takes one run directory, and cluster=NAME or the file that calibrate wrote")
    if cluster == "this-machine.yaml" and not Path(cluster).is_file():
        raise ConfigError(
            "plan check needs cluster=NAME, or this-machine.yaml here: run 'moetrain plan calibrate' first"
        )
    found = compare(folders[0], cluster)
    if as_json:
        return json.dumps(found)
    table = Table(title=f"{folders[0]}: {found['words']}", title_justify="left")
    for head in ("", "predicted", "happened", "off by"):
        table.add_column(head, justify="right" if head else "left")
    for name, (predicted, happened) in found["numbers"].items():
        table.add_row(name, f"{predicted:.4g}", f"{happened:.4g}", f"{predicted / happened - 1:+.1%}")
    console.print(table)
    return ""


def compare(run_dir: Path, cluster: str) -> dict[str, Any]:
    """{"words": the mapping, "numbers": name -> (predicted, happened)}."""
    cfg = read(run_dir / "config.yaml")
    lines = _lines(run_dir / "metrics.jsonl")
    speeds = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")][SKIPPED:]
    if not speeds:
        raise ConfigError(f"{run_dir}/metrics.jsonl has too few steps to compare with: more than {SKIPPED} logged ones")
    world = cfg.launch.world
    load = read_trace(run_dir, cfg.model) if placement_of(cfg) == "fssdp" else None  # which follows the loads
    sent = [line["lsh_sent_share"] for line in lines if line.get("lsh_sent_share")] or [SENT]
    p = Problem(
        cfg, load_cluster(cluster), world, load=load, precisions=(precision_of(cfg),), sent=statistics.median(sent)
    )
    plan = predict(p)
    speed = statistics.median(speeds)
    numbers = {
        "seconds a step": (plan.seconds, p.tokens / speed),
        "tokens/s": (plan.tokens * world, speed),
    }
    measured = [line["memory_gib"] for line in lines if line.get("memory_gib")]
    if measured and p.cluster.kind == "gpu":  # on a CPU it is all that is resident, libraries included
        numbers["GiB on rank 0"] = (plan.by_stage[0] / 2**30, max(measured))
    return {"words": description(plan.row), "numbers": numbers}


def predict(p: Problem) -> Plan:
    """The plan of the mapping that ``p.cfg`` has."""
    row = row_of(p.cfg, check_mapping(p.cfg, p.world))
    return refined(p, priced(p, columns([row])))


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
