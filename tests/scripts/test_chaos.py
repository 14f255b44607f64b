"""A short chaos: a rank killed, all told to stop, a NaN, at random moments; the long one is ``make chaos``."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import chaos


def test_three_faults_on_two_ranks_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "KINDS", ("kill", "term", "nan"))
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chaos.prove(seed, 3, 2, tmp_path)
    told = capsys.readouterr().out
    assert told.count("\nfault ") == 3 and f"skipped: step {chaos.POISONED + 1}, samples" in told
    assert "the same, bit for bit" in told and "steps done again after an end: [" in told
