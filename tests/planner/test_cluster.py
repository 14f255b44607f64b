"""Cluster files: those that ship can be read, and a number that cannot be is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moetrain.config.errors import ConfigError
from moetrain.config.presets import config_root
from moetrain.planner.cluster import load_cluster, names


def test_clusters_that_ship() -> None:
    """Peaks of datasheets; a precision that a GPU lacks runs in the next wider one."""
    expected = {"v100", "a100", "h100", "h800", "h200", "b200", "b300", "gb200", "gb300", "mi250x", "this-machine"}
    assert set(names()) == expected | {"p3dn", "p4d"}
    clusters = {name: load_cluster(name) for name in names()}
    assert clusters["h100"].peak("fp8") == 1979e12
    assert clusters["a100"].peak("fp4") == 312e12
    # The best of large products, measured: 794.5 and 1822 TFLOP/s (mamf-finder's table, stas00/ml-engineering).
    assert clusters["h100"].lasting("bf16") == pytest.approx(794.5e12, rel=0.01)
    assert clusters["gb200"].lasting("bf16") == pytest.approx(1822e12, rel=0.01)
    assert clusters["gb300"].domain == 72 and clusters["h800"].link_gb_s < clusters["h100"].link_gb_s


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory_gib": None}, "memory_gib"),
        ({"memory_gib": 0}, "memory_gib"),
        ({"memory_gib": 80e9}, "memory_gib"),
        ({"memory_gb_s": -1}, "memory_gb_s"),
        ({"network_gb_s": 3200}, "are they exchanged"),
        ({"tflops": {"bf16": 989.5, "fp8": 200}}, "narrower numbers are no slower"),
        ({"tflops": {"fp8": 1979}}, "bf16 or float32"),
        ({"tflops": {"fp16": 989.5}}, "tflops"),
        ({"sustained": 1.2}, "sustained"),
        ({"sustained": 80}, "sustained"),
        ({"exponentials": -4}, "exponentials"),
        ({"node": 0}, "node"),
        ({"domain": 12}, "must be a multiple of node=8"),
        ({"cards": 3}, "must divide node=8"),
        ({"link_us": "3 us"}, "link_us"),
        ({"nvlink": 900}, "nvlink"),
        ({"link_gb_s": 9000, "network_gb_s": 3000}, "above memory_gb_s"),
    ],
)
def test_refuses_missing_and_absurd_numbers(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """With the file and the number in the message. None: the number is left out."""
    tree = yaml.safe_load((config_root() / "cluster" / "h100.yaml").read_text()) | change
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    with pytest.raises(ConfigError) as caught:
        load_cluster(str(file))
    assert str(file) in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_none_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        load_cluster("h10")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(str(tmp_path / "none.yaml"))
