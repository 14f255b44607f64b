"""A parallel-coordinate plot (Inselberg 1985): an upright axis for each key of a sweep, a line across them per run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from moetrain.report.svg import card, number, ticks

HEIGHT, TOP, BOTTOM, SIDE, APART = 328, 50, 18, 74, 150
NEAR = 0.08  # of the height of an axis: a label closer to the one below it is left out
BEST, GOOD, BAD = "#d55e00", (0, 114, 178), (170, 184, 196)


@dataclass(frozen=True)
class Column:
    """One axis. values: of each run, as text or as a number; None where a run has none."""

    title: str
    values: Sequence[str | float | None]


def numbers_of(values: Sequence[str | float | None]) -> list[float | None] | None:
    """The values as numbers; None where one of them is none."""
    try:
        found = [None if value is None else float(value) for value in values]
    except ValueError:
        return None
    return found if all(value is None or math.isfinite(value) for value in found) else None


def places(values: Sequence[str | float | None]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """(place of each value from 0, the foot, to 1; labels with their places). Numbers that span more than a factor of
    20 are placed by their logarithm; what is no number is spread evenly, by name."""
    numbers = numbers_of(values)
    given = [value for value in numbers or [] if value is not None]
    if numbers is None or not given:
        names = sorted({str(value) for value in values if value is not None})
        at = {name: (n + 0.5) / len(names) for n, name in enumerate(names)}
        return [None if v is None else at[str(v)] for v in values], [(at[name], name[:16]) for name in names]
    log = min(given) > 0 and max(given) > 20 * min(given)

    def scale(value: float) -> float:
        return math.log10(value) if log else value

    low, high = scale(min(given)), scale(max(given))
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    few = sorted(set(given))
    labels = [(v, number(v)) for v in few] if len(few) <= 6 else ticks(low, high, log)

    def place(value: float) -> float:
        return (scale(value) - low) / (high - low)

    apart: list[tuple[float, str]] = []
    for value, text in labels:
        if not apart or place(value) - apart[-1][0] >= NEAR:
            apart.append((place(value), text))
    return [None if v is None else place(v) for v in numbers], apart


def parallel(title: str, columns: Sequence[Column], names: Sequence[str], cut: Sequence[bool]) -> str:
    """A wide card. names: of the runs, best first, which is drawn in orange and last; the others go from blue to grey.
    cut: runs that were stopped early, dashed."""
    width = 2 * SIDE + APART * (len(columns) - 1)
    found = [places(column.values) for column in columns]

    def px(n: int) -> float:
        return SIDE + APART * n

    def py(place: float) -> float:
        return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)

    parts = []
    for n, column in enumerate(columns):
        short = column.title if len(column.title) <= 20 else "…" + column.title[-19:]
        parts.append(f'<text x="{px(n)}" y="{18 if n % 2 == 0 else 34}" text-anchor="middle">{escape(short)}</text>')
        parts.append(f'<path class="grid" d="M{px(n)} {TOP}V{HEIGHT - BOTTOM}"/>')
    for run in reversed(range(len(names))):
        points = [(px(n), py(at[run])) for n, (at, _) in enumerate(found) if at[run] is not None]  # type: ignore[arg-type]
        share = run / max(1, len(names) - 1)
        colour = BEST if run == 0 else "rgb({},{},{})".format(
            *(round(g + (b - g) * share) for g, b in zip(GOOD, BAD, strict=True)))  # fmt: skip
        look = f'stroke-width="{3.5 if run == 0 else 1.6}"' + (' stroke-dasharray="6 4"' if cut[run] else "")
        tip = f"{names[run]}: " + ", ".join(f"{c.title} {c.values[run]}" for c in columns)
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path fill="none" stroke="{colour}" {look} d="M{path}"><title>{escape(tip)}</title></path>')
    for n, (_, labels) in enumerate(found):
        for place, text in labels:
            parts.append(f'<path class="grid" d="M{px(n) - 4} {py(place):.1f}h8"/>')
            x, y = px(n) + 7, py(place)
            parts.append(f'<rect class="behind" x="{x - 2}" y="{y - 9:.1f}" width="{9 * len(text) + 2}" height="18"/>')
            parts.append(f'<text x="{x}" y="{y + 5:.1f}">{escape(text)}</text>')
    drawing = f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    limits = f"min-width:{round(0.75 * width)}px;max-width:{round(1.3 * width)}px"
    inside = f'<div class="scroll"><div style="{limits}">{drawing}</div></div>'
    note = "<p>One line per run, the best in orange, then from blue to grey; dashed: stopped early.</p>"
    return card(title, inside + note, wide=True)
