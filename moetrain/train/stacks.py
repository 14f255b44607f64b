"""Where a rank's threads were when a rank was lost: ``stacks/rank-N.txt`` in the run directory, one file a rank."""

from __future__ import annotations

import faulthandler
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO


class Stacks:
    """Writes this rank's file. No error of a disk comes out of here: the run is ending for another reason."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.error: BaseException | None = None  # by which the main thread has left the place where it stood
        self._path = folder / f"rank-{rank}.txt"
        self._late: TextIO | None = None

    def write(self, why: str) -> None:
        """Append ``why``, the error that the main thread met, and the stacks of all threads."""
        with suppress(OSError), self._open() as file:
            file.write(f"{why}\n\n")
            if self.error is not None:
                file.write("".join(traceback.format_exception(self.error)) + "\n")
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n")

    def expect_life(self, seconds: float) -> None:
        """Write the stacks when this is not called again within ``seconds``: nothing of Python runs here any more, and
        only faulthandler's own thread, which needs no interpreter, can tell where it stands."""
        with suppress(OSError):
            if self._late is None and self._path.parent.parent.exists():
                self._late = self._open()
            if self._late is not None:
                faulthandler.dump_traceback_later(seconds, file=self._late)

    def close(self) -> None:
        """The run went well: leave no file."""
        faulthandler.cancel_dump_traceback_later()
        if self._late is not None:
            self._late.close()
            with suppress(OSError):
                if not self._path.stat().st_size:
                    self._path.unlink()
                    self._path.parent.rmdir()

    def _open(self) -> TextIO:
        self._path.parent.mkdir(exist_ok=True)
        return self._path.open("a")
