"""What a conversion leaves: all of it or nothing, and only where there is room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.checkpoint.layout import sync
from moetrain.comm.ranks import one_line
from moetrain.config.errors import ConvertError


def refuse_output(out: Path, nbytes: int) -> None:
    """Raise ConvertError unless ``out`` (a folder, or a file) is free and its disk has room for ``nbytes`` bytes."""
    if out.is_dir() and any(out.iterdir()):
        raise ConvertError(f"'{out}' is not empty; export to another folder or remove it first")
    if out.is_file():
        raise ConvertError(f"'{out}' is there already; write to another name or remove it first")
    if os.path.ismount(out):  # what is written beside it could not take its place
        raise ConvertError(f"'{out}' is where a disk is mounted; write to a folder in it, as {out / 'model'}")
    disk = next(folder for folder in out.resolve().parents if folder.exists())
    if not disk.is_dir():
        raise ConvertError(f"'{out}' cannot be written: '{disk}' is a file, not a folder")
    free = shutil.disk_usage(disk).free
    if nbytes > free:
        raise ConvertError(f"'{out}' will take {size(nbytes)}, and the disk of '{disk}' has {size(free)} free")


@contextmanager
def output(out: Path, nbytes: int, folder: bool = True) -> Iterator[Path]:
    """Where to write what shall become ``out``, a folder or a file: beside it, renamed when whole, removed if not.

    Raises ConvertError: see ``refuse_output``, and for a disk that cannot be written.
    """
    refuse_output(out, nbytes)
    place = out.resolve()  # neither "." nor a link to a folder could be renamed
    partial = place.with_name(place.name + ".partial")
    try:
        _remove(partial)
        (partial if folder else place.parent).mkdir(parents=True, exist_ok=True)
        yield partial
        for path in [partial, *partial.rglob("*")]:  # or a power cut could leave the name, and not the bytes
            sync(path)
        if place.is_dir():
            place.rmdir()
        partial.rename(place)
        sync(place.parent)
    except OSError as error:
        _remove(partial)
        raise ConvertError(f"'{out}' was not written: {one_line(error)}") from None
    except BaseException:
        _remove(partial)
        raise


def size(nbytes: int) -> str:
    """``nbytes`` for people."""
    number, unit = (nbytes / 1e9, "GB") if nbytes >= 1e9 else (nbytes / 1e6, "MB")
    return f"{number:,.1f} {unit}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
