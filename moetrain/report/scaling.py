"""The scaling law of a sweep over sizes, drawn with what it says of a larger model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib.util import find_spec

import numpy as np

from moetrain.planner.scaling import Law, fit, needed
from moetrain.report.read import Run
from moetrain.report.svg import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, card, legend_of, number, table, ticks

LARGER = 10  # times the largest model, for what is predicted
AGAIN = 6  # starts of a fit that is done again with runs left out


def scaling(runs: Sequence[tuple[Run | None, float | None]], metric: str) -> Iterator[str]:
    """Cards for finished runs of three sizes or more whose ``metric`` is a loss; nothing for other sweeps."""
    found = [
        (float(run.summary["params_active"]), run.last("tokens") or 0.0, value)
        for run, value in runs
        if run is not None and value is not None and isinstance(run.summary.get("params_active"), int)
    ]
    sizes = {n for n, _, _ in found}
    if len(sizes) < 3 or "loss" not in metric:
        return
    n, d, loss = (np.array(column) for column in zip(*found, strict=True))
    both = len(set(d)) >= 3 and len(found) >= needed(2)
    if len(found) < needed(1 + both):
        yield card("Too few runs", f"<p>A law needs {needed(1)} finished runs, here are {len(found)}.</p>")
        return
    if find_spec("scipy") is None:
        yield card("No fit", "<p>The fit needs scipy, which is not installed here: pip install 'moetrain[sweep]'</p>")
        return
    x = np.column_stack([n, d]) if both else (6 * n * d)[:, None]
    law = fit(x, loss)
    yield curves(law, both, n, d, loss)
    yield card("The law, and what it says", words(law, both, n, d, loss, x))


def words(law: Law, both: bool, n: np.ndarray, d: np.ndarray, loss: np.ndarray, x: np.ndarray) -> str:
    """The formula, how well it holds, and predictions with their range when each run in turn is left out."""
    names = ("N", "D") if both else ("C",)
    terms = " + ".join(
        f"{a:.4g} / {name}<sup>{p:.3f}</sup>" for a, p, name in zip(law.scale, law.power, names, strict=True)
    )
    off = [abs(law(*row) / y - 1) for row, y in zip(x, loss, strict=True)]
    out = [f"<p>L = {law.floor:.3f} + {terms}</p>"]
    what = "N: parameters that one token uses, D: tokens" + ("" if both else ", C = 6 N D: FLOPs")
    out.append(f"<p>{what}. Fitted to {len(loss)} runs, off by {100 * np.mean(off):.2f}% in the mean, "
               f"{100 * max(off):.2f}% at most.</p>")  # fmt: skip
    for name, limited in zip(names, law.limited, strict=True):
        if limited:
            out.append(f'<p class="note">The power of {name} is at a limit of the fit: these runs do not show how the '
                       "loss falls with it. Take no prediction from them; run longer, or choose a learning rate for "
                       "each size.</p>")  # fmt: skip
    without = (
        [fit(np.delete(x, i, 0), np.delete(loss, i), AGAIN) for i in range(len(x))] if len(x) > needed(1 + both) else []
    )
    rows = []
    for size, tokens in predicted(n, d):
        at = (size, tokens) if both else (6 * size * tokens,)
        others = [one(*at) for one in without]
        span = f"{min(others):.3f} to {max(others):.3f}" if others else ""
        rows.append([number(size), number(tokens), f"{law(*at):.3f}", span])
    out.append(table(["N", "D", "loss", "with one run left out"], rows))
    out.append(held_out(both, n, loss, x))
    return "".join(out)


def predicted(n: np.ndarray, d: np.ndarray) -> list[tuple[float, float]]:
    """(N, D) beyond the runs: a larger model on as many tokens, and on as many more."""
    size = LARGER * float(n.max())
    return [(size, float(d.max())), (size, LARGER * float(d.max()))]


def held_out(both: bool, n: np.ndarray, loss: np.ndarray, x: np.ndarray) -> str:
    """How well the law of the smaller sizes tells the losses of the largest one; nothing where they are too few."""
    small = n < n.max()
    if small.sum() < needed(1 + both) or len(set(n[small])) < 3:
        return ""
    law = fit(x[small], loss[small], AGAIN)
    off = [abs(law(*row) / y - 1) for row, y in zip(x[~small], loss[~small], strict=True)]
    share = f"{100 * np.mean(off):.2f}%"
    return f"<p>A check: fitted without the largest size, the law tells its losses to {share} in the mean.</p>"


def curves(law: Law, both: bool, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> str:
    """Loss over compute, both axes logarithmic: runs as dots, the law as a line for each size and, dashed, for a larger
    one."""
    sizes = [*sorted(set(n)), LARGER * float(n.max())]
    span = np.geomspace(float(d.min()), LARGER * float(d.max()), 40)

    def at(size: float, tokens: float) -> float:
        return law(size, tokens) if both else law(6 * size * tokens)

    every = [at(size, tokens) for size in sizes for tokens in span] + list(loss)
    px = _scale([6 * sizes[0] * span[0], 6 * sizes[-1] * span[-1]], LEFT, WIDTH - RIGHT)
    py = _scale(every, HEIGHT - BOTTOM, TOP)
    parts = []
    low, high = math.log10(min(every)), math.log10(max(every))
    for value, label in ticks(low, high, log=True):
        parts.append(f'<path class="grid" d="M{LEFT} {py(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(value) + 5:.1f}" text-anchor="end">{label}</text>')
    for power in range(math.ceil(math.log10(6 * sizes[0] * span[0])), int(math.log10(6 * sizes[-1] * span[-1])) + 1):
        parts.append(f'<text x="{px(10.0**power):.1f}" y="{HEIGHT - 12}" text-anchor="middle">1e{power}</text>')
    for place, size in enumerate(sizes):
        colour, dashed = COLOURS[place % len(COLOURS)], ' stroke-dasharray="6 4"' if size > n.max() else ""
        path = "L".join(f"{px(6 * size * t):.1f} {py(at(size, t)):.1f}" for t in span)
        parts.append(f'<path class="line" stroke="{colour}"{dashed} d="M{path}"/>')
        for tokens, value in zip(d[n == size], loss[n == size], strict=True):
            tip = f"N {number(size)}, D {number(tokens)}: {value:.4f}"
            parts.append(f'<circle cx="{px(6 * size * tokens):.1f}" cy="{py(value):.1f}" r="4" fill="{colour}">'
                         f"<title>{escape(tip)}</title></circle>")  # fmt: skip
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="scaling law">{"".join(parts)}</svg>'
    names = [f"N {number(size)}" + (", predicted" if size > n.max() else "") for size in sizes]
    return card("Loss over compute 6 N D, FLOPs", drawing + legend_of(names))


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    return lambda value: start + (math.log10(value) - low) / max(high - low, 1e-9) * (end - start)
