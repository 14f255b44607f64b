"""Rotary settings: ours and ``rope_parameters`` of config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moetrain.config.errors import ConvertError
from moetrain.config.schema import RopeConfig
from moetrain.model.rope import yarn_temperature

ORIGINAL = {"original_max_seq_len": "original_max_position_embeddings"}
KEYS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", **ORIGINAL} | {name: name for name in ("low_freq_factor", "high_freq_factor")},
    "yarn": {"factor": "factor", **ORIGINAL}
    | {name: name for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")},
}


def rope_to_hf(cfg: RopeConfig, partial: bool = False) -> dict[str, Any]:
    """``rope_parameters`` of ``cfg``; a zero mscale is left out, as transformers means it.

    partial: whether the class knows heads that are rotated in part.
    """
    found: dict[str, Any] = {"rope_type": "default" if cfg.scaling == "none" else cfg.scaling, "rope_theta": cfg.theta}
    for ours, theirs in KEYS[cfg.scaling].items():
        value = getattr(cfg, ours)
        if value or not ours.startswith("mscale"):
            found[theirs] = value
    return found | ({"partial_rotary_factor": cfg.fraction} if partial else {})


def rope_from_hf(hf: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    """Our ``rope.*`` settings of a completed config.json. Raises ConvertError for rules that are not covered."""
    theirs = hf["rope_parameters"]
    scaling = {"default": "none"}.get(theirs["rope_type"], theirs["rope_type"])
    if scaling not in KEYS:
        raise ConvertError(f"rope_type={scaling!r} of config.json is not covered; covered: {', '.join(KEYS)}")
    fraction = theirs.get("partial_rotary_factor", 1.0)
    if fraction != 1.0 and not partial:
        raise ConvertError(f"partial_rotary_factor={fraction} of config.json is not covered, only 1.0 is")
    found = {"rope.theta": theirs["rope_theta"], "rope.scaling": scaling, "rope.fraction": fraction}
    for ours, key in KEYS[scaling].items():
        if theirs.get(key) is not None:
            found[f"rope.{ours}"] = theirs[key]
    if scaling in ("yarn", "llama3"):
        found.setdefault("rope.original_max_seq_len", hf["max_position_embeddings"])
    if scaling == "yarn" and "rope.factor" not in found:
        found["rope.factor"] = hf["max_position_embeddings"] / found["rope.original_max_seq_len"]
    _check_temperature(theirs, found)
    return found


def _check_temperature(theirs: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    given = theirs.get("attention_factor")
    if given is None or found["rope.scaling"] != "yarn":
        return
    derived = yarn_temperature(RopeConfig(**{path.removeprefix("rope."): value for path, value in found.items()}))
    if not math.isclose(given, derived, rel_tol=1e-6):
        raise ConvertError(f"attention_factor={given} of config.json is not covered, only the rule's own {derived:.6g}")
