"""`moetrain report RUN ...`: run directories -> one HTML page that needs nothing else, for a desk and for a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetrain.config.errors import ConfigError
from moetrain.report.page import page
from moetrain.report.read import Run, read_run

SWEEP = "sweep.yaml"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the runs in ``folders``, several beside each other; a folder of a sweep stands for its runs.

    out: the file; None: ``report.html`` in the first folder. Raises ConfigError where there is no run to show, or the
    page cannot be written.
    """
    runs: list[Run] = []
    for folder in folders:
        if (folder / SWEEP).is_file():
            runs += sweep_runs(folder)
        else:
            runs.append(read_run(folder))
    tell_apart(runs)
    file = out or folders[0] / "report.html"
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(page(runs), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(
            f"report {file} cannot be written: {error.strerror}; choose another file with --out"
        ) from None
    return file


def sweep_runs(folder: Path) -> list[Run]:
    """The runs of a sweep that have begun, best held-out loss first. Raises ConfigError where none has."""
    runs = [read_run(path.parent) for path in sorted(folder.glob("*/metrics.jsonl")) if path.stat().st_size]
    if not runs:
        raise ConfigError(f"report {folder}: no run of this sweep has written metrics yet; wait for the first log step")
    return sorted(runs, key=lambda run: (run.last("val_loss") is None, run.last("val_loss") or 0.0))


def tell_apart(runs: Sequence[Run]) -> None:
    """Give runs of the same name the name of the folder above too; where that is the same, a number."""
    for rename in (lambda run, n: f"{run.path.resolve().parent.name}/{run.name}", lambda run, n: f"{run.name} ({n})"):
        names = [run.name for run in runs]
        for n, run in enumerate(runs, 1):
            if names.count(run.name) > 1:
                run.name = rename(run, n)
