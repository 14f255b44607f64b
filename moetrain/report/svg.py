"""Charts as text: lines as SVG, heat maps as PNG inside the page. No library, no network, no script."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 34
MOST_POINTS = 600  # of a line
MOST_COLUMNS = 240  # of a heat map over time
# Okabe and Ito's colours, told apart also by the colour blind; then lighter ones.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f", "#a6761d", "#b2df8a"]


@dataclass(frozen=True)
class Line:
    """One line of a chart. dots: mark each point, as for the few points of evaluations."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


def chart(
    title: str,
    lines: Sequence[Line],
    unit: str = "",
    log: bool = False,
    marks: Sequence[tuple[int, str, str]] = (),
    zero: bool = False,
) -> str:
    """A card with a line chart over steps. log: logarithmic height. marks: (step, kind, text) of events. zero: the
    height starts at 0."""
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    ys = [y for line in lines for y in line.y if math.isfinite(y) and (y > 0 or not log)]
    if not ys:
        return card(title, "<p>no finite values</p>")
    x0, x1 = 0.0, max(max(line.x) for line in lines)
    y0, y1 = (0.0 if zero and not log else min(ys)), max(ys)
    if log:
        y0, y1 = math.log10(y0), math.log10(y1)
    if y1 - y0 < 1e-12 * max(1.0, abs(y1)):
        pad = abs(y1) * 0.05 or 0.5
        y0, y1 = y0 - pad * (not zero), y1 + pad
    x1 = x1 if x1 > x0 else 1.0
    left = max(LEFT, 16 + 8 * max(len(label) for _, label in ticks(y0, y1, log)))

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (WIDTH - left - RIGHT)

    def py(y: float) -> float:
        y = math.log10(y) if log else y
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value, label in ticks(y0, y1, log):
        y = py(value)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 5:.1f}" text-anchor="end">{label}</text>')
    for value, label in ticks(x0, x1):
        parts.append(f'<text x="{px(value):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{label}</text>')
    for step, kind, text in marks:
        if x0 <= step <= x1:
            parts.append(
                f'<path class="mark {kind}" d="M{px(step):.1f} {TOP}V{HEIGHT - BOTTOM}">'
                f"<title>{escape(text)}</title></path>"
            )
    for n, line in enumerate(lines):
        parts.append(_line(line, COLOURS[n % len(COLOURS)], px, py, log))
    legend = legend_of([line.name for line in lines]) if len(lines) > 1 or lines[0].name else ""
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return card(title + (f", {unit}" if unit else ""), drawing + legend)


def _line(line: Line, colour: str, px, py, log: bool) -> str:  # type: ignore[no-untyped-def]
    path, pen, dots = [], "M", []
    for x, y in thin(line.x, line.y):
        if not math.isfinite(y) or (log and y <= 0):
            pen = "M"
            continue
        path.append(f"{pen}{px(x):.1f} {py(y):.1f}")
        if line.dots or len(line.x) == 1:
            tip = f"{escape(line.name)} step {x:g}: {y:.5g}"
            dots.append(
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{colour}"><title>{tip}</title></circle>'
            )
        pen = "L"
    return f'<path class="line" stroke="{colour}" d="{"".join(path)}"/>{"".join(dots)}'


def thin(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points of a line: of every stretch its lowest and its highest, so that no spike is lost."""
    points = list(zip(x, y, strict=True))
    if len(points) <= MOST_POINTS:
        return points
    size = -(-len(points) // (MOST_POINTS // 2))
    kept = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        bad = [p for p in part if not math.isfinite(p[1])]
        good = [p for p in part if math.isfinite(p[1])]
        ends = {min(good, key=lambda p: p[1]), max(good, key=lambda p: p[1])} if good else set()
        kept += sorted(ends | set(bad[:1]))
    return kept


def ticks(low: float, high: float, log: bool = False) -> list[tuple[float, str]]:
    """About five round values between ``low`` and ``high`` (log: exponents of ten) with their labels."""
    if log and high - low >= 1.5:
        whole = range(math.ceil(low), math.floor(high) + 1)
        return [(10.0**n, number(10.0**n)) for n in list(whole)[:: max(1, len(whole) // 6)]]
    if log:
        low, high = 10**low, 10**high
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next((unit * m for m in (1, 2, 5, 10) if unit * m >= rough), unit * 10)
    found = [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(v, number(v)) for v in found if not log or v > 0]


def number(value: float) -> str:
    """A short form: 0.25, 3k, 1.5M, 2e-04."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def legend_of(names: Sequence[str]) -> str:
    """Coloured names, in the order of COLOURS."""
    items = "".join(
        f'<span><i style="background:{COLOURS[n % len(COLOURS)]}"></i>{escape(name)}</span>'
        for n, name in enumerate(names)
    )
    return f'<div class="legend">{items}</div>'


def heat_map(
    title: str,
    values: np.ndarray,
    rows: str,
    columns: str,
    low: float,
    high: float,
    names: Sequence[str] = (),
) -> str:
    """A card with ``values`` (rows, columns) as colours from ``low`` (white) over blue to ``high`` (dark); NaN is grey.
    rows, columns: what they are. names: of the columns, where they are few."""
    height = max(90, min(280, 22 * len(values)))
    image = (
        f'<img class="heat" style="height:{height}px" alt="{escape(title)}" src="{png(colours(values, low, high))}">'
    )
    below = f'<div class="ends"><span>{escape(columns)}</span></div>'
    if names:
        below = '<div class="ends">' + "".join(f"<span>{escape(name)}</span>" for name in names) + "</div>"
    scale = (
        f'<div class="scale"><span>{number(low)}</span><i></i><span>{number(high)}</span> &#8195;{escape(rows)}</div>'
    )
    return card(title, image + below + scale)


# White, through blue, to near black: also readable in grey.
SCALE = np.array([[247, 251, 255], [158, 202, 225], [49, 130, 189], [8, 48, 107], [20, 10, 40]], dtype=np.float64)


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """RGB (rows, columns, 3), uint8, of ``values``."""
    place = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12), 0, 1) * (len(SCALE) - 1)
    below = np.minimum(place.astype(int), len(SCALE) - 2)
    part = (place - below)[..., None]
    rgb = SCALE[below] * (1 - part) + SCALE[below + 1] * part
    rgb[np.isnan(values)] = 128
    return np.round(rgb).astype(np.uint8)


def png(rgb: np.ndarray) -> str:
    """A data address of the picture ``rgb`` (rows, columns, 3), uint8: the PNG specification's smallest file, of one
    header, one block of data with filter 0 on each row, and the end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns, _ = rgb.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(rgb))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def card(title: str, inside: str, wide: bool = False) -> str:
    """A titled box of the page."""
    return f"<figure{' class=wide' if wide else ''}><figcaption>{escape(title)}</figcaption>{inside}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways on a narrow screen."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
