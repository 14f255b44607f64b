"""What placements of experts would move, counted from their plans alone: ``python scripts/placement_counts.py``.

One MoE layer, forward and backward, float32. Every rank's tokens ask for the same experts: all evenly (balanced), or
expert 0 in every token and the others evenly (hot). rows: of the busiest rank, over the mean. MB: what leaves a rank,
summed over ranks: rows there and back with their gradients, and weights of copies with theirs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from moetrain.moe.placement import plan
from moetrain.moe.placement.plan import Topology

D, F, E, K, TOKENS = 1024, 512, 16, 2, 16384
ROW_MB, EXPERT_MB = 4 * D * 4 / 1e6, 2 * 3 * D * F * 4 / 1e6  # four ways of a row; an expert's weights and gradients
NODE = 8


class Count(NamedTuple):
    """A line of the table."""

    ranks: int
    load: str
    placement: str
    busiest: float
    rows_mb: float
    weights_mb: float


def counts(ranks: int, load: str) -> list[Count]:
    """All placements under one load."""
    topology, tokens = Topology(ranks, NODE), TOKENS // ranks
    first = tokens if load == "hot" else tokens * K // E
    counts_RE = [[first] + [(tokens * K - first) // (E - 1)] * (E - 1)] * ranks
    loads = [float(sum(column)) for column in zip(*counts_RE, strict=True)]
    homes = plan.ep_homes(E, ranks)
    moved = plan.migrate(homes, loads, topology)
    plans = {
        "ep": (homes, plan.at_home(homes)),
        "fssdp, 2 slots": (homes, plan.fssdp(homes, loads, 2, 2, topology)),
        "fssdp, 1 slot, budget 4": (homes, plan.fssdp(homes, loads, 1, 4, topology)),
        "shadow": (homes, plan.shadow(homes, loads, 2, tokens * K / 20, topology)),
        "static, 2 copies": (homes, plan.static(homes, 2, topology)),
        "migrate": (moved, plan.at_home(moved)),
    }
    found = []
    for name, (at, placement) in plans.items():
        sent = plan.routes(counts_RE, placement, topology)
        away = sum(sum(sent[a][b]) for a in range(ranks) for b in range(ranks) if a != b)
        rows = plan.rows_of(counts_RE, placement, topology)
        busiest = max(rows) * ranks / sum(rows)
        found.append(Count(ranks, load, name, busiest, away * ROW_MB, plan.moves(at, placement) * EXPERT_MB))
    return found


def svg(lines: list[Count]) -> str:
    """Bars: the busiest rank on the left, MB on the right (weights paler)."""
    parts, y = [], 24
    top, most = max(c.busiest for c in lines), max(c.rows_mb + c.weights_mb for c in lines)
    for c in lines:
        if c.placement == "ep":
            parts.append(f'<text x="4" y="{y + 14}" font-weight="bold">{c.ranks} ranks, {c.load}</text>')
            y += 20
        a, b, w = 190 * c.busiest / top, 230 * c.rows_mb / most, 230 * c.weights_mb / most
        parts += [
            f'<text x="16" y="{y + 11}">{c.placement}</text>',
            f'<rect x="170" y="{y}" width="{a:.1f}" height="13" fill="#3465a4"/>',
            f'<text x="{174 + a:.1f}" y="{y + 11}">{c.busiest:.2f}</text>',
            f'<rect x="420" y="{y}" width="{b:.1f}" height="13" fill="#3465a4"/>',
            f'<rect x="{420 + b:.1f}" y="{y}" width="{w:.1f}" height="13" fill="#a3bfdf"/>',
            f'<text x="{424 + b + w:.1f}" y="{y + 11}">{c.rows_mb + c.weights_mb:.0f}</text>',
        ]
        y += 18
    head = (
        '<text x="170" y="14">rows of the busiest rank / mean</text>'
        '<text x="420" y="14">MB sent for a layer: rows, weights (pale)</text>'
    )
    size = f'width="720" height="{y + 6}" viewBox="0 0 720 {y + 6}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<rect width="720" height="{y + 6}" fill="white"/>\n'
        f"{head}\n{body}\n</svg>\n"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8], help="expert parallel ranks")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it here")
    args = parser.parse_args()
    if any(n < 2 or E % n for n in args.ranks):
        parser.error(f"--ranks must divide {E} experts, and be at least 2")
    lines = [c for ranks in args.ranks for load in ("balanced", "hot") for c in counts(ranks, load)]
    print("| ranks | load | placement | busiest rank | rows, MB | weights, MB |\n| --- | --- | --- | --- | --- | --- |")
    for c in lines:
        print(f"| {c.ranks} | {c.load} | {c.placement} | {c.busiest:.2f} | {c.rows_mb:.0f} | {c.weights_mb:.0f} |")
    if args.svg is not None:
        args.svg.write_text(svg(lines))


if __name__ == "__main__":
    main()
