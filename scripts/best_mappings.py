"""How high the planner ranks the mappings that the authors of published runs found best.

    python scripts/best_mappings.py ROWS.csv            # among the mappings that were published together
    python scripts/best_mappings.py ROWS.csv --search    # a published one among all legal mappings, with the same stack

ROWS.csv as for fit_planner.py. Published together: of one source, release, model, GPU, number of GPUs, precision,
sequence and batch. In the search: the fastest run of each model, GPU, number of GPUs, precision and sequence, among
mappings of its precision and recomputation without offload, which differ in sizes, micro-batch or virtual stages.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from published import Row, predictions, rows_of
from published_models import PRESETS

from moetrain.config import load
from moetrain.planner.candidates import OFFLOAD, RECOMPUTE, Mappings, columns
from moetrain.planner.footprint import footprint
from moetrain.planner.legal import legal_mappings
from moetrain.planner.rates import FITTED
from moetrain.planner.search import SLACK
from moetrain.planner.step_time import Pricer

SIZES = ("pp", "vpp", "tp", "cp", "ep", "etp", "micro_batch")
ALIKE = 0.01  # mappings within this share of a time count as equal


def mapping(row: Row) -> tuple[int, ...]:
    """What makes two mappings different."""
    return tuple(row.row[name] for name in SIZES)


def published_together(rows: Sequence[Row]) -> list[tuple[Row, int, int]]:
    """(the row that was fastest, its place by prediction, how many mappings there were), of each group with several."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        s = row.setting
        source = row.source.split()[0]
        groups[
            source, row.release, row.model, row.gpu, columns([row.row]).world[0], row.row["precision"], s.run, s.skew
        ].append(row)
    found = []
    for group in groups.values():
        if len({mapping(row) for row in group}) < 2:
            continue
        told = np.array([row.tokens for row in group])
        best = int(told.argmax())
        predicted = predictions(group, FITTED)[:, 0]
        found.append((group[best], 1 + int((predicted > predicted[best] * (1 + ALIKE)).sum()), len(group)))
    return found


def among_all(row: Row) -> tuple[int, int, float] | None:
    """(place of a published mapping among those that fit, their number, time of the fastest over its own); None: not a
    model that moetrain can configure."""
    preset = PRESETS.get(row.model)
    if preset is None:
        return None
    s = replace(row.setting, c=FITTED)
    cfg = load([f"model={preset}", f"train.seq_len={s.run.seq_len}", f"train.global_batch={s.run.global_batch}"])
    own = columns([row.row])
    m = legal_mappings(cfg, s.cluster, int(own.world[0]), (row.row["precision"],))
    plain = m.recompute == RECOMPUTE.index(row.row["recompute"])
    m = m.take(plain & (m.offload == OFFLOAD.index("none")) & (m.dispatch == np.where(m.ep > 1, own.dispatch[0], 0)))
    run = replace(s.run, shards=s.stack.shards, lean=True)
    seconds: dict[tuple[int, ...], float] = {}
    keys = (m.pp * 1000 + m.vpp) * 100 + m.schedule
    for key in np.unique(keys):
        part = m.take(keys == key)
        part = part.take(footprint(s.shape, part, run).total <= SLACK * s.cluster.memory_gib * 2**30)
        if not len(part):
            continue
        for time, one in zip(Pricer(s).step(part).seconds, _names(part), strict=True):
            seconds[one] = min(time, seconds.get(one, np.inf))
    mine = float(Pricer(s).step(own).seconds[0])
    seconds.pop(mapping(row), None)
    times = np.array([*seconds.values(), mine])
    return 1 + int((times < mine * (1 - ALIKE)).sum()), len(times), float(times.min()) / mine


def _names(m: Mappings) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(m, name).tolist() for name in SIZES), strict=True))


def fastest_of_each(rows: Sequence[Row]) -> list[Row]:
    """The fastest run of each model, GPU, number of GPUs, precision and sequence, with balanced routing."""
    fastest: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.setting.skew == 1.0:
            key = (row.model, row.gpu, columns([row.row]).world[0], row.row["precision"], row.setting.run.seq_len)
            fastest[key] = max(row, fastest.get(key, row), key=lambda r: r.tokens)
    return list(fastest.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="ROWS.csv")
    parser.add_argument("--search", action="store_true", help="rank published mappings among all legal ones")
    args = parser.parse_args()
    rows = list(rows_of(args.file))
    if not args.search:
        groups = published_together(rows)
        for row, place, n in groups:
            words = " ".join(f"{name}{size}" for name, size in zip(SIZES, mapping(row), strict=True))
            print(f"  line {row.number:3d} {row.model}, {row.gpu}: {words}: {place} of {n}")
        first = np.mean([place == 1 for _, place, _ in groups])
        print(f"{len(groups)} groups of several mappings: the fastest is predicted first in {first:.0%}")
        return
    places, ratios = [], []
    for row in fastest_of_each(rows):
        ranked = among_all(row)
        if ranked:
            place, n, ratio = ranked
            places.append(place)
            ratios.append(ratio)
            line = f"  line {row.number:3d} {row.model}, {row.gpu}, {row.setting.stack.name}"
            print(f"{line}: {place} of {n}, fastest takes {ratio:.0%} of it", flush=True)
    three, ten = (np.mean([place <= most for place in places]) for most in (3, 10))
    print(f"{len(places)} runs: among the first three in {three:.0%}, ten in {ten:.0%}; fastest takes", end=" ")
    print(f"{np.median(ratios):.0%} of the published one's time, median")


if __name__ == "__main__":
    main()
