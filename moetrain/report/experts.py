"""What a run's experts do: how loaded they are, how sure the routers, and which tokens and domains each serves."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np

from moetrain.report.read import Routing, Run
from moetrain.report.svg import MOST_COLUMNS, Line, card, chart, heat_map, table

MOST_LAYERS = 64  # of heat maps
TOP_TOKENS = 6
HOT = 2.0  # times the mean load


def cards(run: Run) -> Iterator[str]:
    """All cards about the experts of ``run``; none for a dense model."""
    layers = layer_numbers(run)
    per_layer = {
        "load_max_over_mean_by_layer": ("Fullest expert by layer", "rows over the mean"),
        "load_entropy_by_layer": ("Entropy of the load by layer", "1: even"),
        "router_entropy_by_layer": ("Router entropy by layer, held-out text", "of a token's probabilities, over log E"),
    }
    for key, (title, unit) in per_layer.items():
        lines = []
        for n in run.keys_in(key):
            name = f"layer {layers[int(n)]}" if int(n) < len(layers) else f"MoE layer {n}"
            lines.append(Line(name, *run.series(f"{key}/{n}"), dots=key.startswith("router")))
        yield chart(title, lines, unit)
    yield saturation(run)
    yield positions(run)
    yield hot_and_dead(run)
    yield from load_maps(run, layers)
    if run.routing:
        yield from specialisation(run, run.routing[-1])


def layer_numbers(run: Run) -> list[int]:
    """Numbers of the MoE layers in the model, as far as files of the run say them."""
    if run.routing:
        return run.routing[-1].layers
    return [int(name.split(".")[1]) for name in run.loads[-1]["counts"]] if run.loads else []


def load_share(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, load of each expert of layer ``name`` over the mean: (E, columns)), averaged to MOST_COLUMNS columns."""
    rows = [(row["step"], row["counts"][name]) for row in run.loads if name in row["counts"]]
    if not rows:
        return np.zeros(0), np.zeros((1, 0))
    counts_NE = np.array([counts for _, counts in rows], dtype=np.float64)
    parts = np.array_split(np.arange(len(rows)), min(len(rows), MOST_COLUMNS))
    sums_CE = np.stack([counts_NE[part].sum(0) for part in parts])
    mean_C1 = np.maximum(sums_CE.mean(1, keepdims=True), 1e-9)
    return np.array([rows[part[-1]][0] for part in parts]), (sums_CE / mean_C1).T


def load_maps(run: Run, layers: list[int]) -> Iterator[str]:
    """Expert by time, one map per MoE layer."""
    names = list(run.loads[-1]["counts"])[:MOST_LAYERS] if run.loads else []
    for name in names:
        steps, share_EC = load_share(run, name)
        if len(steps):
            columns = f"step {run.loads[0]['step']} to {int(steps[-1])}"
            title = f"Load of the experts, layer {name.split('.')[1]}"
            yield heat_map(title, share_EC, "over the mean; experts downwards", columns, 0.0, 3.0)


def hot_and_dead(run: Run) -> str:
    """Experts that had no row, or more than HOT times the mean, over the last tenth of the run."""
    recent = run.loads[-max(1, len(run.loads) // 10) :]
    rows = []
    for name in run.loads[-1]["counts"] if run.loads else []:
        sums_E = np.sum([row["counts"][name] for row in recent if name in row["counts"]], axis=0, dtype=np.float64)
        share_E = sums_E / max(sums_E.mean(), 1e-9)
        hot = [f"{e} ({share_E[e]:.1f}x)" for e in np.argsort(-share_E) if share_E[e] > HOT][:12]
        dead = [str(e) for e in np.flatnonzero(sums_E == 0)][:24]
        rows.append([name.split(".")[1], ", ".join(hot) or "none", ", ".join(dead) or "none", f"{share_E.max():.2f}"])
    if not rows:
        return ""
    inside = table(["layer", f"hot: over {HOT:g}x the mean", "dead: no row", "fullest"], rows)
    return card("Hot and dead experts, last tenth of the run", inside)


def positions(run: Run) -> str:
    """Share of assignments dropped in each part of the sequence, over the second half of the lines."""
    rows = [row["dropped_by_position"] for row in run.rows if isinstance(row.get("dropped_by_position"), list)]
    if not rows or not np.any(rows):
        return ""
    mean_P = np.mean(rows[len(rows) // 2 :], axis=0)
    ends = [100 * (p + 0.5) / len(mean_P) for p in range(len(mean_P))]
    line = Line("", ends, [float(v) for v in mean_P], dots=True)
    return chart("Dropped by position in the sequence (per cent of its length)", [line], "share", zero=True)


def saturation(run: Run) -> str:
    """How much of the routing of the same held-out tokens was already what it is at the last evaluation: the share of
    the chosen experts that are the same (router saturation; OLMoE, arXiv 2409.02060, section 5.1)."""
    if len(run.routing) < 2:
        return ""
    last, lines = run.routing[-1], []
    alike = [r for r in run.routing if r.ids_LTK.shape == last.ids_LTK.shape and (r.token_T == last.token_T).all()]
    for n, layer in enumerate(last.layers):
        y = [overlap(r.ids_LTK[n], last.ids_LTK[n]) for r in alike]
        lines.append(Line(f"layer {layer}", [r.step for r in alike], y, dots=True))
    return chart("Router saturation", lines, "share of choices as at the end", zero=True)


def overlap(a_TK: np.ndarray, b_TK: np.ndarray) -> float:
    """Mean share of the experts in a token's row of ``b_TK`` that its row of ``a_TK`` has; -1 is no expert."""
    same = ((b_TK[:, :, None] == a_TK[:, None, :]) & (b_TK[:, :, None] >= 0)).any(-1)
    return float(same.sum() / max((b_TK >= 0).sum(), 1))


def specialisation(run: Run, routing: Routing) -> Iterator[str]:
    """Domains, partners and tokens of each expert at the last evaluation."""
    E = routing.counts_LGE.shape[-1]
    for n, layer in list(enumerate(routing.layers))[:MOST_LAYERS]:
        counts_GE = routing.counts_LGE[n].astype(np.float64)
        share_GE = counts_GE / np.maximum(counts_GE.sum(1, keepdims=True), 1) * E
        title = f"Domains of the experts, layer {layer}"
        yield heat_map(title, share_GE.T, "over the mean; experts downwards", "", 0.0, 3.0, routing.domains)
    for n, layer in list(enumerate(routing.layers))[:MOST_LAYERS]:
        together_EE = coactivation(routing.ids_LTK[n], E)
        if routing.ids_LTK.shape[-1] > 1:
            high = max(float(np.nanmax(together_EE)), 1e-6)
            title = f"Experts chosen together, layer {layer}"
            yield heat_map(title, together_EE, "share of the row's tokens", "experts", 0.0, high)
    yield vocabulary(run, routing, E)


def coactivation(ids_TK: np.ndarray, E: int) -> np.ndarray:
    """(E, E): of the tokens that went to expert i the share that also went to j; NaN on the diagonal and for experts
    without a token (OLMoE, arXiv 2409.02060, section 5.2)."""
    chosen_TE = np.zeros((len(ids_TK), E + 1), dtype=np.float32)
    np.put_along_axis(chosen_TE, np.where(ids_TK < 0, E, ids_TK), 1.0, axis=1)
    chosen_TE = chosen_TE[:, :E]
    together = (chosen_TE.T @ chosen_TE).astype(np.float64)
    alone = together.diagonal().copy()
    found = together / np.where(alone == 0, np.nan, alone)[:, None]
    np.fill_diagonal(found, np.nan)
    return found


def vocabulary(run: Run, routing: Routing, E: int) -> str:
    """The tokens that each expert serves most exclusively: of a token's choices in the sample the share that went to
    the expert (vocabulary specialisation; OLMoE, arXiv 2409.02060, section 5.4); tokens that occur 4 times or more."""
    name_of = token_names(run)
    folds: list[str] = []
    for n, layer in list(enumerate(routing.layers))[:MOST_LAYERS]:
        tokens, token_T, seen = np.unique(routing.token_T, return_inverse=True, return_counts=True)
        ids_TK = routing.ids_LTK[n]
        keep_TK = ids_TK >= 0
        flat = (token_T[:, None] * E + np.where(keep_TK, ids_TK, 0))[keep_TK]
        count_VE = np.bincount(flat, minlength=len(tokens) * E).reshape(len(tokens), E)
        share_VE = np.where(seen[:, None] >= 4, count_VE / seen[:, None], 0)
        rows = []
        for e in range(E):
            best = [v for v in np.lexsort((-count_VE[:, e], -share_VE[:, e]))[:TOP_TOKENS] if share_VE[v, e] > 0]
            rows.append([str(e), "   ".join(f"{name_of(int(tokens[v]))} {share_VE[v, e]:.0%}" for v in best)])
        total = np.bincount(ids_TK[keep_TK], minlength=E)
        best_share = count_VE.max(1).sum() / max(total.sum(), 1)
        head = f"layer {layer}: a token's favourite expert gets {best_share:.0%} of its choices"
        folded = "" if folds else " open"
        inside = table(["expert", "tokens, with the share of their occurrences that it serves"], rows)
        folds.append(f"<details{folded}><summary>{escape(head)}</summary>{inside}</details>")
    return card(f"Tokens of the experts, {len(routing.token_T):,} held-out tokens", "".join(folds), wide=True)


def token_names(run: Run):  # type: ignore[no-untyped-def]
    """Token id -> how it is written: by the tokenizer in the folder of the prepared data, else its number."""
    folder = Path(str((run.config.get("data") or {}).get("dir", "")))
    file = folder / "tokenizer.json"
    if not file.is_file():
        return str
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises nothing more exact
        return str
    return lambda v: repr(tokenizer.decode([v], skip_special_tokens=False) or tokenizer.id_to_token(v) or v)
