"""How tests share the cores of a machine, and what they all use: ``make test`` starts two workers of pytest-xdist."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from omegaconf import DictConfig

from moetrain.config import presets

# Workers and ranks fill the cores; threads within an operation would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One seed for all workers, which are started with this environment.
os.environ.setdefault("MOETRAIN_SEED", str(random.SystemRandom().randrange(10**6)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays with one worker, which makes its fixtures once. Mappings are long, have none, and go where there is
    room, at the end."""
    for item in items:
        if item.path.name != "test_parity.py":
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))


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
