"""Mixture weights: from what a user writes, and from rules on token counts, to shares of training tokens."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

from moetrain.config.errors import DataError


def check_weights(given: Mapping[str, float | None], domains: list[str]) -> None:
    """Raises DataError for a weight of an unknown domain, one that is negative or not finite, and weights that are
    all zero."""
    for name, weight in given.items():
        if name not in domains:
            near = difflib.get_close_matches(name, domains, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(domains)}"
            raise DataError(f"weight for an unknown domain '{name}'; {hint}")
        if weight is not None and (not math.isfinite(weight) or weight < 0):
            raise DataError(
                f"weight of domain '{name}' is {weight}; give a number of 0 or more, or null for its share of "
                f"the tokens"
            )
    if domains and all(given.get(name) == 0 for name in domains):
        raise DataError(
            "the weights of all domains are 0; give at least one a positive weight, or null for its share of the tokens"
        )


def resolve_weights(given: Mapping[str, float | None] | None, tokens: Mapping[str, float]) -> dict[str, float]:
    """Shares of training tokens, summing to 1, for the domains of ``tokens`` (domain -> training tokens).

    All weights given: they are normalised. None given: shares in proportion to the tokens. Some given (the others
    null or left out): those are shares, and what is left of 1 goes to the others in proportion to their tokens.
    Raises DataError (``check_weights``).
    """
    given = given or {}
    check_weights(given, list(tokens))
    fixed = {name: float(weight) for name, weight in given.items() if weight is not None}
    free = {name: count for name, count in tokens.items() if name not in fixed}
    total = sum(fixed.values())
    if not free:
        return {name: fixed[name] / total for name in tokens}
    if total >= 1:
        raise DataError(
            f"the given weights sum to {total:g} and leave nothing for {', '.join(free)}; give every domain a "
            f"weight, or shares that sum to less than 1"
        )
    left = (1 - total) / sum(free.values())
    return {name: fixed[name] if name in fixed else tokens[name] * left for name in tokens}


def change_weights(given: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """``before`` (shares that sum to 1) with some of them changed: the others share what is left of 1 as they did.

    All named, or none of the others had any: those given are normalised. Raises DataError (``check_weights``).
    """
    kept = {name: share for name, share in before.items() if name not in given and share > 0}
    if kept:
        return resolve_weights({**dict.fromkeys(before, 0.0), **dict.fromkeys(kept, None), **given}, before)
    return resolve_weights({**dict.fromkeys(before, 0.0), **given}, before)


def temperature_weights(tokens: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Shares in proportion to tokens^(1/temperature), summing to 1: the sampling of multilingual models (Arivazhagan et
    al., arXiv 1907.05019). 1: proportional; large: uniform."""
    largest = max(tokens.values())
    powers = {name: (count / largest) ** (1 / temperature) for name, count in tokens.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}


def unimax_weights(tokens: Mapping[str, float], budget: float, epochs: float) -> dict[str, float]:
    """UniMax (Chung et al., arXiv 2304.09151, algorithm 1): shares, summing to 1, as even as they can be when
    ``budget`` training tokens are to pass over no domain more than ``epochs`` times.

    From the smallest domain on, each takes an even part of what is left of the budget, or ``epochs`` times its tokens
    where that is less. Where the budget is more than all domains have, all are repeated alike.
    """
    given: dict[str, float] = {}
    left = float(budget)
    for n, (name, count) in enumerate(sorted(tokens.items(), key=lambda item: (item[1], item[0]))):
        given[name] = min(left / (len(tokens) - n), epochs * count)
        left -= given[name]
    total = sum(given.values())
    return {name: given[name] / total for name in tokens}
