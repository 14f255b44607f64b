"""Published pretraining speeds as the planner's settings: which model, machine, mapping and software a row tells of."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from published_models import shape_named
from recipes import recipe

from moetrain.planner.candidates import columns
from moetrain.planner.cluster import Cluster, load_cluster
from moetrain.planner.footprint import footprint
from moetrain.planner.layer_time import Setting
from moetrain.planner.memory import Run
from moetrain.planner.rates import STACKS, Constants, Stack
from moetrain.planner.shape import ModelShape, with_mtp
from moetrain.planner.step_time import Pricer, StepTime

H100_PEAK = 989.5e12  # what MFU in the papers is a share of
# Rows that tell of no training run, of a mapping that is not published, or of one that its source calls untuned.
LEFT_OUT = ("layer only", "7b fine-grained", "next-80b")


@dataclass(frozen=True)
class Row:
    """A published row. tokens: per second and GPU, as told or from its TFLOP/s or MFU."""

    number: int
    source: str
    model: str
    gpu: str
    tokens: float
    setting: Setting
    row: dict[str, Any]
    text: str
    release: str = ""

    def price(self, c: Constants, sets: int = 1) -> StepTime:
        """The step that constants ``c`` predict; where these are arrays of ``sets`` values, so many steps."""
        return Pricer(replace(self.setting, c=c)).step(columns([self.row] * sets))

    def predict(self, c: Constants, sets: int = 1) -> np.ndarray:
        """Tokens per second and GPU, for each set of constants."""
        run, m = self.setting.run, columns([self.row])
        tokens = float((m.micro_batches(run.global_batch) * m.micro_batch * m.data)[0]) * run.seq_len
        found: np.ndarray = tokens / self.price(c, sets).seconds / float(m.world[0])
        return found


def rows_of(file: Path) -> Iterator[Row]:
    """The usable rows of a file laid out like published_perf.csv."""
    with file.open() as lines:
        for number, record in enumerate(csv.DictReader(lines), start=2):
            row = read(number, {key: value or "" for key, value in record.items()})
            if row is not None:
                yield row


def read(number: int, r: dict[str, str]) -> Row | None:
    """None: a row that tells too little."""
    named = shape_named(r["model"])
    usable = named is not None and r["seq_len"] and r["n_gpus"] and not any(w in r["model"].lower() for w in LEFT_OUT)
    if not usable or "KNOWN REGRESSION" in r["notes"] or r["mfu"] == "OOM" or "mapping unknown" in r["notes"]:
        return None
    assert named is not None
    name, shape = named
    stack = stack_of(r)
    release = re.search(r"NeMo (\d\d\.\d\d(?:\.\d\d)?)", r["notes"])
    when = release[1] if release else "26.06" if "verification_cards" in r["source"] else ""
    known = recipe(name, cluster_of(r["gpu"]), when, precision_of(r)) if when else None
    if known:
        stack = known[0]
    if name == "deepseek v3" and "w/o mtp" not in r["model"].lower() and "Automodel" not in r["source"]:
        shape = with_mtp(shape)
    if "token drop" in r["notes"] or "tokendrop" in r["model"] or r["source"].startswith("2504"):
        kinds = tuple(replace(k, experts=replace(k.experts, capacity=1.0) if k.experts else None) for k in shape.kinds)
        shape = replace(shape, kinds=kinds)
    seq, world = int(r["seq_len"]), int(r["n_gpus"])
    told = tokens_of(r, shape, seq)
    if told is None:
        return None
    row = mapping_of(r, world, name)
    if row is None:
        return None
    # Of stages that outnumber layers (a framework counts embedding and loss as layers) as many as there are layers for.
    row["vpp"] = min(row["vpp"], len(shape.layers) // row["pp"])
    if row["vpp"] == 1:
        row["schedule"] = "1f1b"
    batch = int(r["gbs"] or 0) or 256
    flush = re.search(r"LBS=(\d+)", r["notes"])  # sequences that a rank's pipeline runs before it is empty again
    batch = int(flush[1]) * row["dp"] if flush else batch
    natural = "natural routing" in r["notes"]
    setting = Setting(
        shape, Run(seq, batch), machine(cluster_of(r["gpu"])), stack, Constants(),
        recompute_extra=known[1] if known else recompute_of(r), skew=-1.0 if natural else 1.0,
    )  # fmt: skip
    if row["recompute"] == "none" and not setting.recompute_extra and not known:
        setting = replace(setting, recompute_extra=recompute_to_fit(setting, row))
    return Row(number, r["source"], name, cluster_of(r["gpu"]), told, setting, row, " ".join(r.values()), when)


def tokens_of(r: dict[str, str], shape: ModelShape, seq: int) -> float | None:
    """Tokens per second and GPU."""
    if r["tokens_per_s_per_gpu"]:
        return float(r["tokens_per_s_per_gpu"])
    flops = shape.flops_per_token(seq)
    if r["tflops_per_gpu"]:
        return float(r["tflops_per_gpu"]) * 1e12 / flops
    return float(r["mfu"]) / 100 * H100_PEAK / flops if r["mfu"] else None


def mapping_of(r: dict[str, str], world: int, name: str) -> dict[str, Any] | None:
    """The mapping of a row; None where it does not multiply out to the number of GPUs."""
    tp, cp, pp, vpp, ep = (int(r[key] or 1) for key in ("tp", "cp", "pp", "vpp", "ep"))
    text = r["notes"]
    etp = int(r["etp"] or 1)
    if r["source"].startswith("2504") and not r["etp"]:  # without folding experts are split as attention is
        etp = tp
    if r["source"].startswith("2505.11432"):
        etp, tp = (tp, tp) if tp > 1 else (1, 8 if "SP attention" in text else 1)
    if name.startswith("llama3 70b d") or name.startswith("llama3 405b"):
        ep = etp = 1
    if world % (pp * tp * cp) or world % (pp * ep * etp):
        return None
    return {
        "pp": pp, "vpp": vpp if pp > 1 else 1, "dp": world // (pp * tp * cp), "cp": cp, "tp": tp,
        "edp": world // (pp * ep * etp), "ep": ep, "etp": etp, "micro_batch": int(r["mbs"] or 1),
        "schedule": "interleaved_1f1b" if vpp > 1 and pp > 1 else "1f1b",
        "recompute": "full" if "full recompute" in text else "none",
        "dispatch": "all_to_all" if ep > 1 else "local", "precision": precision_of(r), "context": "ring",
    }  # fmt: skip


def precision_of(r: dict[str, str]) -> str:
    """A word of candidates.PRECISION."""
    narrow = r["precision"].lower()
    return "fp4" if "fp4" in narrow else "fp8" if "fp8" in narrow else "bf16"


def recompute_to_fit(s: Setting, row: dict[str, Any]) -> float:
    """Share of forward that a row which is silent about it computes again, for its activations to fit. What is cheapest
    for its bytes goes first, so freeing a share f of them costs about f^2 of a forward pass."""
    run = replace(s.run, shards=s.stack.shards, lean=True)
    found = footprint(s.shape, columns([row]), run)
    held = {name: float(value[0]) for name, value in found.of_fullest().items()}
    need = float(found.total[0]) - (held["unreduced"] if s.stack.reduce_each else 0.0)
    over = need - 0.95 * s.cluster.memory_gib * 2**30
    return float(np.clip(over / held["activations"], 0.0, 1.0)) ** 2


def recompute_of(r: dict[str, str]) -> float:
    """Share of forward that a row computes again beside what its mapping says."""
    text = r["notes"]
    if "layernorm+moe" in text:
        return 0.6
    return 0.0


def cluster_of(gpu: str) -> str:
    """h100 for "H100 SXM 80GB"."""
    return gpu.split()[0].lower()


@functools.cache
def machine(name: str) -> Cluster:
    """A cluster that ships with moetrain."""
    return load_cluster(name)


def stack_of(r: dict[str, str]) -> Stack:
    """The software of a row, from its source and its release."""
    source, text = r["source"], r["notes"]
    release = re.search(r"NeMo (\d\d\.\d\d(?:\.\d\d)?)", text)
    blackwell = cluster_of(r["gpu"]) in ("gb200", "gb300", "b200", "b300")
    name = "megatron"
    if source.startswith("2504"):
        name = "fsdp" if text.startswith("FSDP") else "megatron-2024"
    elif source.startswith("2505.11432"):
        name = "megascale" if "MegaScale" in text else "megatron-2024"
    elif "Automodel" in source or "FSDP on" in text:
        name = "automodel"
    elif "llama README" in source:
        name = "megatron-2024"
    elif (release and release[1] >= "26.06") or "verification_cards" in source:
        name = "megatron-2026" if blackwell else "megatron-graphs"
    elif re.search("overlap on|EP overlap, 62|A2A overlap", text) or (source.startswith("2603") and not blackwell):
        name = "megatron-overlap"
    elif "A2A, norm" in text:
        name = "megatron-2024"
    elif release and release[1] >= "26.02.01":
        name = "megatron-graphs"
    return STACKS[name]


def predictions(rows: Iterable[Row], c: Constants, sets: int = 1) -> np.ndarray:
    """Tokens per second and GPU, an array (rows, sets of constants); where routing is natural, with ``c.natural``."""
    found = []
    for row in rows:
        s = row.setting
        natural = replace(row, setting=replace(s, skew=c.natural)) if np.any(s.skew < 0) else row
        found.append(natural.predict(c, sets))
    return np.array(found)
