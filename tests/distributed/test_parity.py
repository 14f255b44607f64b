"""Every mapping gives the same loss: 20 steps against the one-process run of the same config, which uses the oracles.

float64: per-step loss, auxiliary losses and gradient norm, and the held-out loss after them, within 1e-9 relative,
expert loads exactly equal, weights within 1e-7. DeepSpeed knows no float64; its lines of the table, and a third of the
others, run in float32 within 1e-5. Another third runs in bf16, where the curves stay within noise of each other.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from pathlib import Path
from typing import get_args

import pytest
from moetrain_launch.fork import run_ranks

from moetrain.config import Config
from moetrain.config import load as load_config
from moetrain.config.check import check_mapping
from moetrain.config.errors import ConfigError
from moetrain.config.schema import Activation
from moetrain.config.sizes import divisors
from moetrain.train import parity
from tests.distributed import mappings
from tests.distributed.mappings import COLUMNS, ELSEWHERE, EXCLUDED, INCLUDES, Row, name_of, overrides, pairs, world
from tests.distributed.toy_run import BASE, alone, check_float32, load

TABLE = mappings.table()
TORCH = [row for row in TABLE if row["engine"] == "torch"]
DEEPSPEED = [row for row in TABLE if row["engine"] != "torch"]
SMALL = TORCH[: len(TORCH) * 2 // 3]  # the table is sorted by ranks
FLOAT32, BF16 = [*SMALL[1::2], *DEEPSPEED], SMALL[::2]


def curves(prepared: Path, row: Row, precision: str, reference: str) -> tuple[list[parity.Curve], parity.Curve]:
    """(of all ranks, of one process)."""
    cfg = load(prepared, [*overrides(row), f"train.precision={precision}"])
    one = alone(prepared, (*mappings.model_of(row), f"train.precision={reference}"))
    return run_ranks(world(row), parity.curve, cfg, timeout=300), one


def test_every_two_features_meet_or_are_refused() -> None:
    """All levels of all columns, pair by pair. What the table leaves out, the config checks refuse."""
    assert len(TABLE) >= 40
    assert {world(row) for row in TABLE} == {1, 2, 4, 8}
    met = {frozenset(pair) for row in TABLE for pair in pairs(row)}
    excluded = {frozenset(pair) for pair in (*EXCLUDED, *ELSEWHERE)}
    assert not met & excluded
    for one, other in itertools.combinations(COLUMNS, 2):
        columns = ([(name, level) for level in COLUMNS[name] if (name, level) not in INCLUDES] for name in (one, other))
        for pair in itertools.product(*columns):
            assert frozenset(pair) in met | excluded, f"{pair} meet in no line"


@pytest.mark.parametrize("pair", EXCLUDED, ids=lambda pair: " ".join(":".join(part) for part in pair))
def test_what_cannot_meet_is_refused(pair: tuple[tuple[str, str], tuple[str, str]]) -> None:
    row = {name: next(iter(levels)) for name, levels in COLUMNS.items()} | {"micro": "4"} | dict(pair)
    if row["placement"] != "-":
        row["ep"] = "2"
    if row["etp"] == "2" or row["ep"] != "-":
        row["dp"] = "shard"
    with pytest.raises(ConfigError):
        load_config([*BASE, *overrides(row)], check=lambda cfg: check_mapping(cfg, world(row)))


@pytest.mark.parametrize("row", TORCH[::-1], ids=name_of)  # the longest first, so that no worker has one left
def test_float64(prepared: Path, row: Row) -> None:
    differences = parity.differences(*curves(prepared, row, "float64", "float64"))
    assert differences.within(1e-9), differences


@pytest.mark.parametrize("row", FLOAT32, ids=name_of)
def test_float32(prepared: Path, row: Row) -> None:
    reference = "float32" if row["engine"] == "torch" else "float64"
    check_float32(*curves(prepared, row, "float32", reference))


@pytest.mark.parametrize("row", BF16, ids=name_of)
def test_bf16(prepared: Path, row: Row) -> None:
    """A token whose two best experts are as good as equal may go to another one, so loads are not compared."""
    differences = parity.differences(*curves(prepared, row, "bf16", "bf16"))
    assert differences.loss_rel < parity.TOLERANCE["bf16"], differences


SEED = int(os.environ["MOETRAIN_SEED"])  # random, by tests/conftest.py, which says it at the end
DRAWS = 20
ACTIVATIONS = get_args(Activation)


def draw(rng: random.Random) -> tuple[int, list[str]]:
    """(world, settings): sizes, features and a small model at random; perhaps nothing that may run."""
    row = {name: rng.choice(list(levels)) for name, levels in COLUMNS.items()} | {"engine": "torch"}
    pick = rng.choice
    row |= {name: "-" for name in ("pp", "cp") if rng.random() < 0.4}
    free = [name for name in COLUMNS if name not in ("dp", "tp", "ep", "etp", "micro", "experts")]
    settings = list(itertools.chain.from_iterable(COLUMNS[name][row[name]] for name in free))
    sizes = {"tp": pick([1, 1, 1, 2, 3, 4]), "dp_replicate": pick([1, 1, 1, 2, 3])}
    stage = math.prod([*sizes.values(), pick([1, 1, 2, 3]), 1 if row["cp"] == "-" else 2])
    size = stage if row["pp"] == "-" else 2 * stage
    sizes["etp"] = pick([1, 1, *divisors(stage)])
    sizes["ep"] = pick([1, *divisors(stage // sizes["etp"])])
    experts = pick([4, 6, 8, 12, 16])
    model = {
        "model.dim": pick([24, 36, 48]),
        "model.n_layers": pick([2, 4, 5, 6]),
        "model.attention.n_heads": pick([4, 6, 8, 12]),
        "model.vocab_size": pick([300, 312]),
        "model.dense_dim": pick([24, 48]),
        "model.moe.num_experts": experts,
        "model.moe.top_k": pick([1, 2, min(4, experts)]),
        "model.moe.expert_dim": pick([12, 16, 24]),
        "model.moe.first_dense": pick([0, 1]),
        "model.activation": pick(ACTIVATIONS),
        "model.moe.activation": pick(ACTIVATIONS),
        "train.seq_len": pick([12, 16, 24]),
        "train.micro_batch": pick([1, 2, 3]),
        "train.global_batch": pick([8, 12, 16]),
        "optim.lr": 0.003,
    }
    if row["shared"] == "yes":
        model["model.moe.shared_dim"] = pick([12, 24])
    return size, [*settings, *(f"parallel.{n}={v}" for n, v in sizes.items()), *(f"{k}={v}" for k, v in model.items())]


def legal_draws() -> list[tuple[str, int, list[str]]]:
    """The first draws that the config checks let pass; all others they refuse with a ConfigError, in one line."""
    rng, found = random.Random(SEED), []
    while len(found) < DRAWS:
        size, settings = draw(rng)
        if size > 8:
            continue
        try:
            load_config([*BASE, *settings], check=lambda cfg, size=size: check_mapping(cfg, size))
        except ConfigError as error:
            assert "\n" not in str(error)
            continue
        found.append((f"seed {SEED}, {len(found)}", size, settings))
    return found


@pytest.fixture(scope="module")
def draws() -> list[tuple[str, int, list[str]]]:
    return legal_draws()


@pytest.mark.parametrize("number", range(DRAWS))
def test_random(prepared: Path, draws: list[tuple[str, int, list[str]]], number: int) -> None:
    """Drawn from all mappings and small models, legal or not: what the checks let pass runs, and in parity.

    The seed is in the message of a failure; MOETRAIN_SEED=... draws the same again.
    """
    name, size, settings = draws[number]
    differences = four_steps(prepared, size, settings)
    assert differences.within(1e-9), f"{name}: world {size}, {' '.join(settings)}: {differences}"


def test_mlps_without_a_gate(prepared: Path) -> None:
    """All that MLPs have is split: dense and shared ones over tp, experts and their biases over ep and etp."""
    model = ["model.activation=relu2", "model.moe.activation=gelu", "model.moe.bias=true", "model.norm_offset=1"]
    sizes = ["parallel.dp_shard=2", "parallel.tp=2", "parallel.ep=2", "parallel.etp=2"]
    differences = four_steps(prepared, 4, [*model, *sizes])
    assert differences.within(1e-9), differences


def four_steps(prepared: Path, size: int, settings: list[str]) -> parity.Differences:
    """Of a mapping against one process, in float64."""
    cfg: Config = load(prepared, [*settings, "train.precision=float64", "train.steps=4"])
    mapped = run_ranks(size, parity.curve, cfg, timeout=300)
    [one] = run_ranks(1, parity.curve, parity.one_process(cfg, size), timeout=300)
    return parity.differences(mapped, one)
