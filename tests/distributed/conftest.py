"""Fixtures of the distributed tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.data.prepare import prepare
from tests.distributed.toy_run import load


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level tokens of two tiny domains."""
    folder = tmp_path_factory.mktemp("data")
    for name, text in (
        ("letters", "abcdefghij klmnop qrstuv wxyz. "),
        ("digits", "1 + 2 = 3; 40 - 5 = 35; 6 * 7 = 42. "),
    ):
        (folder / f"{name}.txt").write_text("".join(text[i % 7 :] + "\n" for i in range(120)))
    prepare(load(folder, []).data)
    return folder
