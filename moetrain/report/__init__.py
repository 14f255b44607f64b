"""`moetrain report RUN ...`: run directories -> one HTML page that needs nothing else, for a desk and for a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetrain.config.errors import ConfigError
from moetrain.report.page import page
from moetrain.report.read import Run, read_run
from moetrain.report.sweep import read_sweep_runs, sweep_page

SWEEP = "sweep.yaml"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the runs in ``folders``, several beside each other, or of one sweep; beside others a sweep
    stands for its runs.

    out: the file; None: ``report.html`` in the first folder. Raises ConfigError where there is no run to show, or the
    page cannot be written.
    """
    if len(folders) == 1 and (folders[0] / SWEEP).is_file():
        text = sweep_page(read_sweep_runs(folders[0]))
    else:
        runs: list[Run] = []
        for folder in folders:
            ranked = read_sweep_runs(folder).entries if (folder / SWEEP).is_file() else []
            runs += [entry.run for entry in ranked if entry.run is not None] or [read_run(folder)]
        tell_apart(runs)
        text = page(runs)
    file = out or folders[0] / "report.html"
    if file.is_dir():
        raise ConfigError(f"report --out {file}: this is a folder; give a file, as {file / 'report.html'}")
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(
            f"report {file} cannot be written: {error.strerror}; choose another file with --out"
        ) from None
    return file


def tell_apart(runs: Sequence[Run]) -> None:
    """Give runs of the same name the name of the folder above too; where that is the same, a number."""
    for rename in (lambda run, n: f"{run.path.resolve().parent.name}/{run.name}", lambda run, n: f"{run.name} ({n})"):
        names = [run.name for run in runs]
        for n, run in enumerate(runs, 1):
            if names.count(run.name) > 1:
                run.name = rename(run, n)
