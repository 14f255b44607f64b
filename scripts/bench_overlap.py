"""Time of dispatch hidden behind the shared experts: ``bench.py dispatch --parts hidden``."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from bench_ranks import Shape, build_layer, on_ranks, print_table, step, tokens_of

HIDDEN = Shape(dim=512, experts=8, top_k=2, expert_dim=512, shared_dim=512, tokens=1024)


def hidden_table(args: argparse.Namespace) -> dict[str, Any]:
    """How much of the wait for the outputs and their gradients goes away."""
    s = HIDDEN
    print(f"\noverlap, ep=2 on 2 processes: dim {s.dim}, {s.experts} experts of {s.expert_dim}, shared experts of "
          f"{s.shared_dim}, {s.tokens} tokens each, float32; milliseconds")  # fmt: skip
    answers = on_ranks(2, overlap_times, s, args.rounds)
    rows = []
    for i, overlap in enumerate(("off", "on")):
        waits, steps = zip(*(answer[i] for answer in answers), strict=True)
        outputs, all_of_them, whole = (
            statistics.mean(w[0] for w in waits),
            statistics.mean(sum(w) for w in waits),
            statistics.mean(steps),
        )
        rows.append({"overlap": overlap, "wait for outputs and their gradients": 1e3 * outputs,
                     "wait for all rows": 1e3 * all_of_them, "step": 1e3 * whole})  # fmt: skip
    print_table(rows)
    off, on = rows
    waits = ("wait for outputs and their gradients", "wait for all rows")
    hidden = off[waits[0]] - on[waits[0]]
    shares = {key.replace("wait for", "hidden share of the wait for"): hidden / off[key] for key in waits}
    for key, share in shares.items():
        print(f"  {key}: {share:.0%}")
    return {"rows": rows, **shares}


def overlap_times(s: Shape, rounds: int) -> list[tuple[tuple[float, float], float]]:
    """With overlap off and on: ((median wait for outputs and their gradients, for rows and theirs), median step), s."""
    layer, x = build_layer(s, "all_to_all", 2, 1), tokens_of(s, dist.get_rank())
    results: list[list[tuple[float, float, float]]] = [[], []]
    for i in range(rounds + 2):
        for overlap in (False, True):
            layer.dispatcher.overlap = overlap
            dist.barrier()
            with waiting() as waits:
                start = time.perf_counter()
                step(layer, x)
                seconds = time.perf_counter() - start
            # In order: counts, rows, outputs, the outputs' gradients, the rows' gradients.
            _, rows, outputs, output_grads, row_grads = waits
            if i >= 2:
                results[overlap].append((outputs + output_grads, rows + row_grads, seconds))
    medians = [[statistics.median(column) for column in zip(*result, strict=True)] for result in results]
    return [((m[0], m[1]), m[2]) for m in medians]


class Timed:
    """A collective's work; adds the time that is spent waiting for it to ``waits[i]``."""

    def __init__(self, work: Any, waits: list[float], i: int) -> None:
        self.work, self.waits, self.i = work, waits, i

    def wait(self) -> None:
        """Wait, and take the time."""
        start = time.perf_counter()
        self.work.wait()
        self.waits[self.i] += time.perf_counter() - start


@contextlib.contextmanager
def waiting() -> Iterator[list[float]]:
    """Seconds that this rank stands still for each all-to-all, in order of departure."""
    waits: list[float] = []
    original = dist.all_to_all_single

    def timed(*args: Any, **more: Any) -> Timed:
        start = time.perf_counter()
        work = original(*args, **more)
        waits.append(time.perf_counter() - start)
        return Timed(work, waits, len(waits) - 1)

    dist.all_to_all_single = timed
    try:
        yield waits
    finally:
        dist.all_to_all_single = original
