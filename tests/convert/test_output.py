"""What a conversion leaves is on the disk before it has its name: a power cut must not leave the name alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moetrain.convert.output import output


@pytest.mark.parametrize("folder", [True, False])
def test_bytes_are_on_the_disk_before_the_name(folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def named(self: Path, target: Path) -> Path:
        done.append("named")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", named)
    with output(tmp_path / "out", 1, folder) as partial:
        written = [partial / "a", partial / "b/c"] if folder else [partial]
        for path in written:
            path.parent.mkdir(exist_ok=True)
            path.write_text("text")
    before, after = done[: done.index("named")], done[done.index("named") + 1 :]
    assert {str(path) for path in written} <= set(before) and after == [str(tmp_path)]
