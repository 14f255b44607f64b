"""How tests share the cores of a machine, and what they all use: ``make test`` starts two workers of pytest-xdist."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from omegaconf import DictConfig
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from moetrain.config import presets

# Workers and ranks fill the cores; threads within an operation would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One seed for all workers, which are started with this environment.
os.environ.setdefault("MOETRAIN_SEED", str(random.SystemRandom().randrange(10**6)))


class ByFile(LoadScopeScheduling):
    """A file stays with one worker, which makes its fixtures once. Mappings are long, have none, and go where there is
    room, at the end: each with all its precisions, which are held against the same run of one process."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        return f"{file} {test.partition('[')[2] or test}" if file.endswith("test_parity.py") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"the seed of what was drawn at random: MOETRAIN_SEED={os.environ['MOETRAIN_SEED']}")


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra takes a fifth of a second to compose presets, and most tests choose the same ones: moetrain's own, which do
    not change meanwhile, are composed once for each choice."""
    compose, known = presets._compose, {}

    def from_known(chosen: list[str], found: presets.Presets) -> DictConfig:
        if len(found.folders) > 1:
            return compose(chosen, found)
        key = (found.folders, *chosen)
        if key not in known:
            known[key] = compose(chosen, found)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "_compose", from_known)
        yield
