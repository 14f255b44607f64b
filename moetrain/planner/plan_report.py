"""What ``moetrain plan`` says: tables for people, one line of JSON for scripts."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moetrain.planner.footprint import PARTS
from moetrain.planner.search import SLACK, Found, Plan, Problem, description, why_slower
from moetrain.planner.step_time import SPLIT

GIB = 2**30


def as_json(p: Problem, found: Found, tokens: float | None) -> dict[str, Any]:
    """All numbers; seconds, bytes."""
    return {
        "model": p.cfg.model.name, "cluster": p.cluster.name, "gpus": p.world, "stack": p.stack.name,
        "seq": p.cfg.train.seq_len, "global_batch": p.cfg.train.global_batch,
        **({"sent": p.sent} if found.best and found.best[0].row["dispatch"] == "lsh" else {}),
        "looked_at": found.looked_at, "fit": found.fit,
        "capacity": p.capacity, "plans": [_json(p, found, plan, tokens) for plan in found.best],
        "frontier": [{"bytes": b, "tokens_per_s_per_gpu": t} for b, t in found.frontier],
    }  # fmt: skip


def _json(p: Problem, found: Found, plan: Plan, tokens: float | None) -> dict[str, Any]:
    days = None if tokens is None else tokens / (plan.tokens * p.world) / 86400
    return {
        "mapping": plan.row, "words": description(plan.row), "seconds": plan.seconds,
        "tokens_per_s_per_gpu": plan.tokens,
        "tflops_per_gpu": plan.tflops, "utilisation": plan.utilisation, "parts": plan.parts, "hidden": plan.hidden,
        "memory": plan.memory, "by_stage": plan.by_stage, "out_of_memory": plan.out_of_memory,
        "simulated": plan.simulated,
        "days": days, "gpu_hours": None if days is None else days * 24 * p.world,
        "loses_by": why_slower(found.best[0], plan),
    }  # fmt: skip


def best_table(p: Problem, found: Found, tokens: float | None) -> RenderableType:
    """The best mappings, and why each but the first is slower."""
    t = p.cfg.train
    title = (
        f"{p.cfg.model.name} on {p.world} x {p.cluster.name}, {t.global_batch} x {t.seq_len} tokens a step: "
        f"{found.fit:,} of {found.looked_at:,} mappings fit"
    )
    table = Table(title=title, title_justify="left")
    heads = ["", "mapping", "tokens/s/GPU", "TFLOP/s", "utilisation", "GiB", "s/step"]
    heads += ["days", "GPU-hours"] if tokens is not None else []
    heads += ["out of memory"] if p.load is not None else []
    for head in (*heads, "loses by"):
        table.add_column(head, justify="left" if head in ("mapping", "loses by") else "right", overflow="fold")
    for i, plan in enumerate(found.best):
        cells = [
            str(i + 1),
            description(plan.row),
            f"{plan.tokens:,.0f}",
            f"{plan.tflops:,.0f}",
            f"{plan.utilisation:.1%}",
        ]
        cells += [f"{plan.total / GIB:.1f}", f"{plan.seconds:.3g}"]
        if tokens is not None:
            days = tokens / (plan.tokens * p.world) / 86400
            cells += [f"{days:,.3g}", f"{days * 24 * p.world:,.0f}"]
        cells += [f"{plan.out_of_memory:.0%}"] if plan.out_of_memory is not None else []
        table.add_row(*cells, "" if i == 0 else why_slower(found.best[0], plan))
    return table


def plan_tables(p: Problem, plan: Plan) -> RenderableType:
    """One mapping: where its time and its memory go."""
    time = Table(title=f"{description(plan.row)}: {plan.seconds:.4g} s a step", title_justify="left")
    time.add_column("time")
    time.add_column("s", justify="right")
    time.add_column("share", justify="right")
    for name in SPLIT:
        if plan.parts[name] > 0:
            time.add_row(name, f"{plan.parts[name]:.4g}", f"{plan.parts[name] / plan.seconds:.1%}")
    time.add_row("(hidden communication)", f"{plan.hidden:.4g}", "")
    held = Table(title="GiB on the fullest rank", title_justify="left")
    held.add_column("memory")
    held.add_column("GiB", justify="right")
    for name in (*PARTS, "host"):
        if plan.memory[name] > 0:
            held.add_row(name, f"{plan.memory[name] / GIB:.2f}")
    held.add_row("total on the device", f"{plan.total / GIB:.2f}")
    held.add_row(f"of {p.cluster.memory_gib:g}, less {1 - SLACK:.0%} for gaps", f"{p.capacity / GIB:.2f}")
    stages = Text("by pipeline rank: " + " ".join(f"{x / GIB:.1f}" for x in plan.by_stage))
    summary = Text(f"{plan.tokens:,.0f} tokens/s/GPU, {plan.tflops:,.0f} TFLOP/s, {plan.utilisation:.1%} of the peak")
    if plan.row["dispatch"] == "lsh":
        summary.append(f"\ndispatch=lsh changes what the model computes; {p.sent:.0%} of the rows are sent")
    return Group(time, held, stages, summary) if len(plan.by_stage) > 1 else Group(time, held, summary)
