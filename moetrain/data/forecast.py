"""What the mixture will do to the data until the end of a run: said before the first step."""

from __future__ import annotations

import math

from moetrain.data.loader import Loader

NEARLY_FREE = 4  # passes
DECAY = 15.387756  # R* of the data-constrained scaling law, Muennighoff et al., arXiv 2305.16264
SHOWN = 12


def worth(passes: float) -> float:
    """How many times its size in new text a text is worth that is read ``passes`` times: U(1 + R*(1 - exp(-R_D/R*))) of
    the data-constrained scaling law (arXiv 2305.16264), for U = 1 and R_D = passes - 1."""
    return passes if passes <= 1 else 1 + DECAY * (1 - math.exp(-(passes - 1) / DECAY))


def describe(loader: Loader, step: int, steps: int) -> list[str]:
    """The weights in force at ``step`` and how they will change until ``steps``, one line each."""
    sampler, start = loader.sampler, loader.first_sample(step)
    if sampler.end is not None and start >= sampler.end:
        return []
    lines = [shares(sampler.domain_weights(start))]
    for phase in sampler.history:
        if start < phase.first_sample < loader.first_sample(steps):
            at = f"from step {loader.step_of(phase.first_sample):,}"
            kind, _, source = phase.why.partition(" ")
            if kind == "exhausted":
                passes = sampler.epochs(phase.first_sample)[source]
                at = f"'{source}' runs out at step {loader.step_of(phase.first_sample):,} of {steps:,}, after"
                at += f" {passes:.3g} passes; its share goes to the others:"
            lines.append(f"{at} {shares(sampler.domain_weights(phase.first_sample))}")
    if sampler.end is not None and sampler.end < loader.first_sample(steps):
        lines.append(f"the data runs out at step {loader.step_of(sampler.end):,} of {steps:,}: {why_end(loader)}")
    return lines


def why_end(loader: Loader) -> str:
    """Why the data ends where it ends."""
    sampler = loader.sampler
    assert sampler.end is not None
    counts, sources = sampler.dealer.counts(sampler.end), sampler.dealer.sources
    out = [name for name, s in sources.items() if s.cap is not None and counts[name] >= s.cap]
    passes = sampler.epochs(sampler.end)
    names = ", ".join(f"'{name}' after {passes[name]:.3g} passes" for name in out)
    return f"{names} (data.exhausted={sampler.dealer.exhausted})"


def warnings(loader: Loader, steps: int) -> list[str]:
    """One line for each source that the whole run passes over more often than repetition is nearly free."""
    sampler, last = loader.sampler, loader.first_sample(steps)
    last = last if sampler.end is None else min(last, sampler.end)
    lines = []
    for name, passes in sampler.epochs(last).items():
        if passes > NEARLY_FREE:
            lines.append(
                f"'{name}' is repeated: {passes:.3g} passes in {steps:,} steps, worth about {worth(passes):.3g} times "
                f"its size in new text; more than {NEARLY_FREE} help less and less (arXiv 2305.16264)"
            )
    return lines


def shares(weights: dict[str, float]) -> str:
    """Weights of domains as people read them, the largest first, no more than a dozen."""
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(f"{name} {100 * weight:.3g}%" for name, weight in ordered[:SHOWN]) + more
