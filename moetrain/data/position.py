"""Where a run stands in its data: what a checkpoint keeps of it, and how a resumed run takes it up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetrain.checkpoint import load, newest
from moetrain.config.errors import DataError
from moetrain.data.asked import Asked
from moetrain.data.history import Phase, WeightHistory
from moetrain.data.sampler import Sampler


def position(sampler: Sampler, asked: Asked, samples: int) -> dict[str, Any]:
    """What a checkpoint keeps after ``samples`` samples: the history of the weights, what the config asked for, and of
    each source what the order of its samples depends on. Plain data."""
    counts, data = sampler.dealer.counts(samples), sampler.data
    sources = {
        name: {
            "domain": data.domain_of[name],
            "samples": counts[name],
            "windows": len(cut),
            "mean_tokens": cut.mean_tokens,
            "sha256": data.manifest.domains[name].train.sha256["bin"],
        }
        for name, cut in sampler.windows.items()
    }
    return {
        "samples": samples,
        "seed": sampler.seed,
        "seq_len": sampler.seq_len,
        "history": sampler.dealer.settled(samples).to_json(),
        "asked": _asked_at(asked, samples),
        "sources": sources,
    }


def saved_position(run_dir: Path) -> dict[str, Any] | None:
    """What the newest checkpoint of a run keeps (of ``position``), without a look at its hashes; None where there is
    none, or where it does not keep it. Collective. Raises CheckpointError when it cannot be read."""
    path = newest(run_dir / "checkpoints", verify=False)
    state: dict[str, Any] = {"train": {}}
    if path is not None:
        load(path, state)
    found: dict[str, Any] | None = state["train"].get("data")
    return found


def restore(sampler: Sampler, asked: Asked, saved: dict[str, Any]) -> list[str]:
    """Take up ``saved`` (of ``position``): every sample is then what it would have been without the stop, unless the
    config asks for other weights or caps than it did; these hold from the next sample on. Returns lines that say so.

    Raises DataError when seed, grouping, or windows or text of a source differ: samples would be repeated or left out.
    """
    refuse_other_order(sampler, saved)
    samples, names = saved["samples"], list(dict.fromkeys([*saved["sources"], *sampler.windows]))
    sampler.dealer.sources = {name: sampler.dealer.sources[name] for name in names}  # as then
    phases = WeightHistory.from_json(saved["history"])
    known = WeightHistory(Phase(p.first_sample, {n: p.weights.get(n, 0.0) for n in names}, p.why) for p in phases)
    coming = [phase for phase in asked.phases if phase.first_sample >= samples]
    sampler.dealer.restore(known, samples, coming)
    before, now = saved["asked"], _asked_at(asked, samples)
    if before == now:
        return []
    in_force, decided, why = sampler.history.at(samples), sampler.dealer.asked_at(samples), "user"
    if before["first"] != now["first"]:
        weights = asked.phases[0].weights  # said now, so it comes before a schedule that has begun
    elif before["weights"] == now["weights"] and decided.why.startswith("mixer"):
        weights, why = decided.weights, decided.why  # only caps are others
    else:
        weights = asked.weights_at(samples)
    sampler.change(samples, weights, why)
    changed = _difference(in_force.weights, sampler.history.at(samples).weights)
    if not changed:
        sampler.dealer.restore(known, samples, coming)
        return []
    return [f"weights changed from sample {samples:,} on: {changed}"]


def _asked_at(asked: Asked, samples: int) -> dict[str, Any]:
    """What the config asks for at a sample, without zeros and nulls: a new source that gets nothing changes nothing."""
    first, weights = asked.phases[0].weights, asked.weights_at(samples)
    return {
        "first": {name: weight for name, weight in first.items() if weight > 0},
        "weights": {name: weight for name, weight in weights.items() if weight > 0},
        "max_epochs": {name: cap for name, cap in asked.max_epochs.items() if cap is not None},
        "exhausted": asked.exhausted,
    }


def refuse_other_order(sampler: Sampler, saved: dict[str, Any]) -> None:
    """Raise DataError where samples would be repeated or left out."""
    if sampler.seed != saved["seed"]:
        raise DataError(
            f"seed={sampler.seed}, but this run began with seed {saved['seed']}, from which the order of its data "
            f"follows; take out seed={sampler.seed}, or start a new run"
        )
    if sampler.seq_len != saved["seq_len"]:
        raise DataError(
            f"train.seq_len={sampler.seq_len}, but this run began with {saved['seq_len']}: with other windows text "
            "would be repeated and left out; keep it, or start a new run"
        )
    for name, source in saved["sources"].items():
        cut = sampler.windows.get(name)
        if cut is None:
            raise DataError(f"source '{name}' of this run is not in the data any more; keep it, with weight 0")
        digest = sampler.data.manifest.domains[name].train.sha256["bin"]
        now = (len(cut), cut.mean_tokens, digest)
        if now != (source["windows"], source["mean_tokens"], source["sha256"]):
            raise DataError(
                f"source '{name}' is not the text that this run began with, or is cut otherwise (now {len(cut):,} "
                f"windows, then {source['windows']:,}): samples would be repeated or left out; restore it and "
                "data.packing, or give new text as a source of another name"
            )
    new_of: dict[str, str] = {}
    old_of: dict[str, str] = {}
    for name, source in saved["sources"].items():
        old, new = source["domain"], sampler.data.domain_of[name]
        if new_of.setdefault(old, new) != new or old_of.setdefault(new, old) != old:  # a new name for all is none
            raise DataError(
                f"source '{name}' shares its domain '{new}' with others than when this run began (in '{old}'), and "
                f"samples are dealt by domain: some would be repeated and others left out; group data.sources as they "
                f"were, or start a new run"
            )


def _difference(before: dict[str, float], now: dict[str, float]) -> str:
    """The weights that differ, for people."""
    return ", ".join(f"{n} {before[n]:.4g} -> {now[n]:.4g}" for n in now if abs(now[n] - before[n]) > 1e-12)
