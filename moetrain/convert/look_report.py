"""What ``moetrain inspect`` shows: tables, a picture, and all numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from moetrain.config.errors import ConfigError
from moetrain.convert.look import Figures, Look
from moetrain.convert.output import size

HELP = """usage: moetrain inspect PATH [plot=FILE.png] [--json]

Show what weights look like: family, shapes, parameters by part, norms and outliers, how alike the experts of each layer
are, norms of the routers' rows. PATH is what 'moetrain convert from=' takes: a run, a checkpoint of one, a Hugging Face
folder, or a file of to=safetensors. It is read part by part, so the model need not fit into memory.

  plot=FILE        where the picture goes: .png, .pdf or .svg (default inspect.png); plot=none: no picture
  --json           all numbers as one line of JSON instead of tables"""

NOTE = "rms: root mean square. outlier: largest magnitude over the rms. cosine: of pairs of whole experts."


def parse(words: Sequence[str]) -> tuple[str, str | None]:
    """(path, file of the picture or None) of the command's words. Raises ConfigError."""
    plots = [word.removeprefix("plot=") for word in words if word.startswith("plot=")]
    paths = [word for word in words if not word.startswith("plot=")]
    if len(paths) != 1 or len(plots) > 1:
        raise ConfigError("inspect takes one path, and plot=FILE; see 'moetrain inspect --help'")
    plot = plots[0] if plots else "inspect.png"
    if plot == "none":
        return paths[0], None
    check_plot(plot)
    return paths[0], plot


def check_plot(file: str) -> None:
    """Raise ConfigError for a picture that could not be written, before time is spent."""
    path = Path(file)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"plot={file}: give a name that ends in .png, .pdf or .svg")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"plot={file}: there is no folder {path.parent}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("the picture needs matplotlib: install it, or set plot=none") from None


def as_json(found: Look) -> str:
    """All numbers on one line."""
    whole: dict[str, Any] = {name: getattr(found, name) for name in ("family", "path", "shape", "total", "active")}
    whole["parts"] = {part: _plain(figures) for part, figures in found.parts.items()}
    whole["layers"] = [
        {"layer": layer, "part": part, **_plain(figures)}
        for (layer, part), figures in found.layers.items()
        if layer >= 0
    ]
    whole["experts"] = [asdict(layer) for layer in found.experts]
    return json.dumps(whole)


def _plain(f: Figures) -> dict[str, Any]:
    return asdict(f) | {"dtypes": sorted(f.dtypes), "rms": f.rms, "outlier": f.outlier}


def as_tables(found: Look) -> RenderableType:
    """What the model is, its parts, and its MoE layers."""
    shape = ", ".join(f"{key} {value}" for key, value in found.shape.items())
    nbytes = sum(part.nbytes for part in found.parts.values())
    about = (
        f"{found.path}: {found.family}, {found.total:,} parameters, {found.active:,} active for a token, {size(nbytes)}"
    )
    notes = [about, shape]
    broken = [f"{part}: {f.nonfinite:,}" for part, f in found.parts.items() if f.nonfinite]
    if broken:
        notes.append(f"NOT FINITE: {', '.join(broken)} elements")
    tables: list[RenderableType] = [escape(line) for line in notes]
    tables.append(_parts(found))
    if found.experts:
        tables.append(_experts(found))
    return Group(*tables, NOTE)


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _parts(found: Look) -> Table:
    table = _table("parts", ("part", "parameters", "share", "dtype", "rms", "norm", "outlier", "in"), ("part", "in"))
    stored = sum(f.parameters for f in found.parts.values())
    for part, f in found.parts.items():
        dtype, norm = "/".join(sorted(f.dtypes)), f.squares**0.5
        table.add_row(part, f"{f.parameters:,}", f"{f.parameters / stored:.1%}", dtype, f"{f.rms:.4g}", f"{norm:.4g}",
                      f"{f.outlier:.1f}", escape(f.of))  # fmt: skip
    return table


def _experts(found: Look) -> Table:
    columns = ("layer", "experts", "cosine mean", "max", "pair", "expert norm", "router norm")
    table = _table("MoE layers", columns, ("pair",))
    for e in found.experts:
        pair = f"{e.pair[0]}, {e.pair[1]}" if len(e.norms) > 1 else ""
        table.add_row(str(e.layer), str(len(e.norms)), f"{e.cosine_mean:+.4f}", f"{e.cosine_max:+.4f}", pair,
                      _spread(e.norms), _spread(e.router_norms))  # fmt: skip
    return table


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def draw(found: Look, file: str) -> None:
    """Write the picture: by layer, how alike experts are, norms of routers and experts, rms and outliers of parts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{found.path}: {found.family}, {found.total / 1e6:,.1f}M parameters")
    (alike, norms), (rms, outliers) = figure.subplots(2, 2)
    x = [e.layer for e in found.experts]
    alike.plot(x, [e.cosine_max for e in found.experts], marker="o", label="most alike pair")
    alike.plot(x, [e.cosine_mean for e in found.experts], marker="o", label="mean over pairs")
    alike.set(title="cosine between experts", xlabel="layer")
    for name, label in (("router_norms", "rows of the router"), ("norms", "experts")):
        values = [getattr(e, name) for e in found.experts]
        norms.plot(x, [fmean(v) for v in values], marker="o", label=label)
        norms.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
    norms.set(title="norms: mean, and least to most", xlabel="layer", yscale="log" if x else "linear")
    for part in found.parts:
        at = {layer: f for (layer, theirs), f in sorted(found.layers.items()) if theirs == part and layer >= 0}
        if at:
            rms.plot(list(at), [f.rms for f in at.values()], marker=".", label=part)
            outliers.plot(list(at), [f.outlier for f in at.values()], marker=".", label=part)
    rms.set(title="root mean square", xlabel="layer", yscale="log")
    outliers.set(title="largest magnitude over root mean square", xlabel="layer", yscale="log")
    for axes in (alike, norms, rms, outliers):
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
