"""The page: what is compared between runs first, then each run by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from moetrain.report import experts
from moetrain.report.read import Run
from moetrain.report.svg import Line, card, chart, number, table

# key -> title, unit, logarithmic height, from zero
SCALARS: dict[str, tuple[str, str, bool, bool]] = {
    "loss": ("Training loss", "nats per token", False, False),
    "val_loss": ("Held-out loss", "nats per token", False, False),
    "lr": ("Learning rate", "", False, True),
    "grad_norm": ("Gradient norm", "before clipping", True, False),
    "tokens_per_s": ("Speed", "tokens per second, all ranks", False, True),
    "mfu": ("Utilisation", "share of the device's peak", False, True),
    "tflops_per_rank": ("Model FLOPs", "TFLOP/s per rank", False, True),
    "memory_gib": ("Memory of rank 0", "peak, GiB", False, True),
    "load_max_over_mean": ("Fullest expert, worst layer", "rows over the mean", False, False),
    "dead_experts": ("Dead experts", "all layers", False, True),
    "dropped_share": ("Dropped by capacity", "share of assignments", False, True),
}
STYLE = """
:root{color-scheme:light dark;--ink:#1c2733;--soft:#667585;--paper:#f4f6f8;--card:#fff;--rule:#dfe5ea}
@media(prefers-color-scheme:dark){:root{--ink:#e3e9ef;--soft:#9aa8b5;--paper:#12181e;--card:#1b232b;--rule:#34404b}}
*{box-sizing:border-box}body{margin:0;padding:20px clamp(12px,3vw,40px);background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}h1{font-size:24px;margin:0 0 4px}h2{font-size:19px;margin:30px 0 10px}
h3{font-size:16px;margin:22px 0 8px}p{margin:4px 0;color:var(--soft)}.note{color:#c0392b}
.cards{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
figure{margin:0;padding:12px;background:var(--card);border:1px solid var(--rule);border-radius:8px;min-width:0}
figure.wide{grid-column:1/-1}figcaption{font-weight:600;margin-bottom:6px}svg{display:block;width:100%;height:auto}
svg text{font:14px system-ui,sans-serif;fill:var(--soft)}.grid{stroke:var(--rule);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.mark{stroke-width:1.5;stroke-dasharray:4 3;fill:none;stroke:#999}
.mark.restart{stroke:#d55e00}.mark.event{stroke:#c0392b;stroke-dasharray:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;color:var(--soft);max-height:96px;overflow:auto}
.legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
img.heat{display:block;width:100%;image-rendering:pixelated;border:1px solid var(--rule)}
.ends,.scale{display:flex;font-size:12px;color:var(--soft);gap:4px;align-items:center}
.ends span{flex:1;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;text-align:center}
.scale{margin-top:4px}.scale i{width:90px;height:10px;
background:linear-gradient(90deg,#f7fbff,#9ecae1,#3182bd,#08306b,#140a28)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;width:100%}
th,td{padding:4px 10px 4px 0;text-align:left;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--soft);font-weight:500}code{font-size:13px}
.command{white-space:pre-wrap;overflow-wrap:anywhere;margin:6px 0 14px;padding:10px 12px;background:var(--card);
border:1px solid var(--rule);border-radius:8px}svg .behind{fill:var(--card);opacity:.85}
.bar{display:flex;gap:8px;align-items:center;margin:6px 0;font-size:13px}.bar span{flex:0 0 34%;overflow-wrap:anywhere}
.bar i{height:12px;border-radius:2px;background:#0072b2;min-width:1px}
@media(max-width:560px){svg text{font-size:17px}}
"""


def page(runs: Sequence[Run]) -> str:
    """The whole HTML page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(run.name for run in runs[:6])
    body = [f"<h1>{escape(title)}</h1>", *notes(runs), overview(runs), differences(runs)]
    body += [section("Training", compared(runs)), section("Held-out loss by domain", by_domain(runs))]
    for run in runs:
        head = "" if len(runs) == 1 else f"{run.name}: "
        body += [section(head + "data and time", own(run)), section(head + "experts", experts.cards(run))]
        body.append(event_list(run, head))
    return html(title, body)


def html(title: str, body: Sequence[str]) -> str:
    """``body`` as a whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>moetrain: {escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def section(title: str, cards: Iterator[str]) -> str:
    """A heading with cards below; nothing where there are none."""
    found = "".join(cards)
    return f'<h2>{escape(title[0].upper() + title[1:])}</h2><div class="cards">{found}</div>' if found else ""


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """What could not be read, and which runs are not at their end."""
    for run in runs:
        for note in run.notes:
            yield f'<p class="note">{escape(run.name)}: {escape(note)}</p>'
        if not run.summary:
            step = run.rows[-1]["step"]
            yield f"<p>{escape(run.name)}: no summary.json, so it is running or was stopped; up to step {step}</p>"


def overview(runs: Sequence[Run]) -> str:
    """One line per run: what came out."""
    rows = []
    for run in runs:
        params = [run.summary.get(key) for key in ("params_total", "params_active")]
        val, speed = run.last("val_loss"), run.last("tokens_per_s")
        rows.append(
            [
                run.name,
                str(get(run.config, "model.name") or ""),
                " / ".join(number(p) for p in params if isinstance(p, int | float)),
                f"{run.rows[-1]['step']:,} of {get(run.config, 'train.steps') or '?'}",
                number(run.last("tokens") or 0),
                f"{run.last('loss') or math.nan:.4f}",
                "" if val is None else f"{val:.4f}",
                "" if speed is None else number(speed),
                f"{sum(kind == 'restart' for _, kind, _ in run.events)}",
                str(run.summary.get("exit_reason", "")),
            ]
        )
    head = [
        "run",
        "model",
        "parameters / active",
        "step",
        "tokens",
        "loss",
        "held-out loss",
        "tokens/s",
        "restarts",
        "ended",
    ]
    return table(head, rows)


def differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ."""
    flat = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    differ = [key for key in keys if key != "run_dir" and len({str(tree.get(key, "")) for tree in flat}) > 1]
    if not differ or len(runs) == 1:
        return ""
    rows = [[f"{key}", *(str(tree.get(key, "")) for tree in flat)] for key in differ[:60]]
    return "<h2>Settings that differ</h2>" + table(["setting", *(run.name for run in runs)], rows)


def compared(runs: Sequence[Run]) -> Iterator[str]:
    """A chart per figure, with a line per run."""
    alone = len(runs) == 1
    for key, (title, unit, log, zero) in SCALARS.items():
        lines = [Line("" if alone else run.name, *run.series(key), dots=key == "val_loss") for run in runs]
        if key in ("dead_experts", "dropped_share") and not any(any(line.y) for line in lines):
            continue  # a flat line at zero says less than the table below it
        yield chart(title, lines, unit, log, runs[0].events if alone else (), zero)
    waits = [Line("" if alone else run.name, *waiting(run)) for run in runs]
    yield chart("Waiting for data", waits, "% of the step, rank 0", zero=True)
    for key in dict.fromkeys(key for run in runs for row in run.rows[:1] for key in row if key.endswith("_loss")):
        if key not in SCALARS:
            yield chart(f"{key}, before its coefficient", [Line("" if alone else r.name, *r.series(key)) for r in runs])


def waiting(run: Run) -> tuple[list[float], list[float]]:
    """(steps, per cent of the step's time that rank 0 waited for data)."""
    pairs = [
        (r["step"], 100 * r["data_wait_s"] / r["step_s"]) for r in run.rows if r.get("step_s") and "data_wait_s" in r
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def by_domain(runs: Sequence[Run]) -> Iterator[str]:
    """Of one run a chart with a line per domain; of several a chart per domain with a line per run."""
    names = list(dict.fromkeys(name for run in runs for name in run.keys_in("val_loss_by_domain")))
    if len(runs) == 1:
        lines = [Line(name, *runs[0].series(f"val_loss_by_domain/{name}"), dots=True) for name in names]
        yield chart("Held-out loss", lines, "nats per token", marks=runs[0].events)
        return
    for name in names:
        lines = [Line(run.name, *run.series(f"val_loss_by_domain/{name}"), dots=True) for run in runs]
        yield chart(name, lines, "nats per token")


def own(run: Run) -> Iterator[str]:
    """What is shown of each run by itself: the mixture as it was read, and where the time of a step goes."""
    read = mixture(run)
    yield chart("Mixture as it was read", [Line(n, *xy) for n, xy in read.items()], "share of sequences", zero=True)
    names = run.keys_in("mixture")
    yield chart(
        "Mixture asked for by the mixer", [Line(n, *run.series(f"mixture/{n}")) for n in names], "share", zero=True
    )
    parts = run.keys_in("time_split")
    lines = [Line(name, *run.series(f"time_split/{name}")) for name in parts]
    yield chart("Where the time of a step goes", lines, "share of the step, rank 0", zero=True)


def mixture(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Domain -> (steps, its share of the sequences read since the line before). About 30 stretches."""
    rows = [row for row in run.rows if isinstance(row.get("read_by_domain"), dict)]
    rows = rows[:: max(1, len(rows) // 30)]
    found: dict[str, tuple[list[float], list[float]]] = {}
    before: dict[str, Any] = {}
    for row in rows:
        now = row["read_by_domain"]
        fresh = {name: now[name] - before.get(name, 0) for name in now}
        total = sum(fresh.values())
        for name, count in fresh.items():
            if total > 0:
                steps, shares = found.setdefault(name, ([], []))
                steps.append(row["step"])
                shares.append(count / total)
        before = now
    return found


def event_list(run: Run, head: str) -> str:
    """The events as a table."""
    if not run.events:
        return ""
    rows = [[f"{step:,}", kind, text] for step, kind, text in run.events[:500]]
    inside = card("Kept checkpoints, restarts and what the run reported", table(["step", "kind", "what"], rows), True)
    return section(head + "events", iter([inside]))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def get(tree: Any, path: str) -> Any:
    """The setting ``path``, or None."""
    return dict(leaves(tree)).get(path)
