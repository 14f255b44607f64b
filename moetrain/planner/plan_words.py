"""The words of ``moetrain plan``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.config.errors import ConfigError
from moetrain.config.presets import nearest
from moetrain.planner.candidates import PRECISION, WORDS
from moetrain.planner.rates import STACKS

HELP = """usage: moetrain plan model=NAME cluster=NAME gpus=N [key=value ...] [--json] [--plot FILE] [--emit ...]
       moetrain plan mapping=pp=8,ep=32,micro_batch=1 model=NAME cluster=NAME gpus=N ...
       moetrain plan calibrate [out=FILE] [ranks=N] [base=CLUSTER]
       moetrain plan check RUN_DIR [cluster=NAME]

Predict memory, speed and the best mapping of a run. Other settings are those of 'moetrain train'.

  cluster=NAME     one of configs/cluster, or the path of a .yaml file like those (calibrate writes one)
  gpus=N           how many of its GPUs
  seq=N            tokens in a sequence (train.seq_len; 4096)
  global_batch=N   sequences in a step (train.global_batch; 4 million tokens)
  tokens=N         the budget, for days and GPU-hours: 15T, 300B, 2e9
  mapping=A=B,...  explain this one: pp, vpp, dp_replicate, cp, tp, ep, etp, micro_batch, schedule, recompute, offload,
                   dispatch, placement, precision, context
  precision=NAME   bf16 or fp8 (of the experts' products); without: both where the cluster has units for both
  trace=PATH       a run directory whose loads to plan for; zipf=S: loads by a Zipf law. With either, copies of hot
                   experts (placement=fssdp) are weighed as well
  sent=0.28        of mapping=...,dispatch=lsh: share of the rows that it sends (lsh_sent_share of a run's metrics)
  stack=NAME       what trains: moetrain, or another framework that the time model was fitted on
  top=N            how many to show (10)

  --json           all numbers as one line of JSON
  --plot FILE      time and memory as stacked bars, and the frontier of memory against speed: .png, .pdf, .svg
  --emit experiment=NAME   write the best mapping as a preset that 'moetrain train experiment=NAME' runs"""

SIZES = ("pp", "vpp", "dp_replicate", "cp", "tp", "ep", "etp", "micro_batch")


@dataclass
class Asked:
    """What the words say. others: settings and presets of a run."""

    cluster: str = ""
    gpus: int = 0
    seq: int | None = None
    global_batch: int | None = None
    tokens: float | None = None
    mapping: dict[str, Any] | None = None
    precision: str | None = None
    trace: Path | None = None
    zipf: float | None = None
    sent: float | None = None
    stack: str = "moetrain"
    top: int = 10
    others: list[str] = field(default_factory=list)


def parse(words: Sequence[str]) -> Asked:
    """Raises ConfigError for what cannot be read or is missing."""
    asked = Asked()
    seen: set[str] = set()
    for word in words:
        name, _, value = word.partition("=")
        if name in seen:
            raise ConfigError(f"{name}= is there twice; give it once")
        seen.update({name} & set(Asked.__dataclass_fields__))
        if name in ("gpus", "seq", "global_batch", "top"):
            if not re.fullmatch(r"[0-9]+", value) or not 1 <= int(value) <= 10**9:
                raise ConfigError(f"{name} takes a whole number of 1 or more; got '{value}'")
            setattr(asked, name, int(value))
        elif name == "tokens":
            asked.tokens = amount(value)
        elif name == "zipf":
            if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) > 10:
                raise ConfigError(f"zipf takes a power from 0 to 10, as 0.8; got '{value}'")
            asked.zipf = float(value)
        elif name == "sent":
            if not re.fullmatch(r"\d+(\.\d+)?", value) or not 0 < float(value) <= 1:
                raise ConfigError(f"sent takes a share of the rows above 0, up to 1, as 0.28; got '{value}'")
            asked.sent = float(value)
        elif name == "mapping":
            asked.mapping = read_mapping(value)
        elif name == "precision":
            if value not in ("bf16", "fp8", "float32"):
                raise ConfigError(f"precision takes bf16, fp8 or float32; got '{value}'")
            asked.precision = value
        elif name == "stack":
            if value not in STACKS:
                raise ConfigError(f"no stack is called '{value}'; {nearest(value, list(STACKS))}")
            asked.stack = value
        elif name == "trace":
            asked.trace = Path(value)
        elif name == "cluster":
            asked.cluster = value
        else:
            asked.others.append(word)
    if not asked.cluster or not asked.gpus:
        raise ConfigError("plan needs cluster=NAME and gpus=N, as cluster=h100 gpus=64; see 'moetrain plan --help'")
    if asked.trace is not None and asked.zipf is not None:
        raise ConfigError("trace= and zipf= each say how experts are loaded; give one of them")
    return asked


def amount(text: str) -> float:
    """20B, 15T, 2e9. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kKMBT]?)", text)
    number = 0.0 if found is None else float(found[1]) * 1000 ** " KMBT".index(found[2].upper() or " ")
    if number < 1:
        raise ConfigError(f"tokens takes a number of 1 or more, as 2e9, 300B or 15T; got '{text}'")
    return number


def read_mapping(text: str) -> dict[str, Any]:
    """{"pp": 8, "recompute": "full"} of "pp=8,recompute=full". Raises ConfigError."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in (*SIZES, *WORDS):
            raise ConfigError(f"mapping takes name=value,... of {', '.join((*SIZES, *WORDS))}; cannot read '{part}'")
        if name in found:
            raise ConfigError(f"mapping has {name} twice; give it once")
        if name in SIZES:
            if not re.fullmatch(r"[0-9]+", value) or int(value) < 1:
                raise ConfigError(f"mapping: {name} takes a whole number of 1 or more; got '{value}'")
            found[name] = int(value)
        elif value not in WORDS[name] or (name == "precision" and value == PRECISION[3]):
            raise ConfigError(f"mapping: {name} takes {', '.join(WORDS[name])}; got '{value}'")
        else:
            found[name] = value
    return found
