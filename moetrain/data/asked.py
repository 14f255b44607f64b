"""What a config asks of the mixture: weights of domains and sources, by hand or by rule, their schedule, and caps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moetrain.config.check_data import first_samples
from moetrain.config.errors import DataError
from moetrain.config.schema import Config
from moetrain.config.schema_data import DataConfig
from moetrain.data.deal import Exhausted
from moetrain.data.history import Phase
from moetrain.data.weights import change_weights, resolve_weights, temperature_weights, unimax_weights


@dataclass(frozen=True)
class Asked:
    """``phases``: the weights of the config and of its schedule, by their first samples; those of a schedule that began
    before a resumed run's last sample may have negative ones. ``max_epochs``: source -> passes after which it has run
    out, None: never."""

    phases: tuple[Phase, ...]
    max_epochs: dict[str, float | None]
    exhausted: Exhausted

    def weights_at(self, sample: int) -> dict[str, float]:
        """The shares of sources asked for at ``sample``."""
        return [phase for phase in self.phases if phase.first_sample <= sample][-1].weights


@dataclass(frozen=True)
class _Shares:
    """Shares of domains, and those of sources within their domains; each sums to 1."""

    domains: dict[str, float]
    inside: dict[str, dict[str, float]]

    def of_sources(self) -> dict[str, float]:
        return {s: self.domains[d] * share for d, shares in self.inside.items() for s, share in shares.items()}


def domains_of(cfg: DataConfig) -> dict[str, str]:
    """Source -> its domain."""
    return {name: source.domain or name for name, source in cfg.sources.items()}


def ask(cfg: Config, tokens: Mapping[str, int], step: int = 0, sample: int = 0) -> Asked:
    """What ``cfg`` asks of sources with ``tokens`` (source -> training tokens), in a run whose step ``step`` begins
    with sample ``sample``. Raises DataError for weights that leave nothing, for the whole or for a domain."""
    t, d = cfg.train, cfg.data
    shares = _first_shares(d, tokens, t.steps * t.global_batch * t.seq_len)
    phases = [Phase(0, shares.of_sources(), "config")]
    for n, (entry, first) in enumerate(zip(d.schedule, first_samples(cfg, step, sample), strict=True)):
        try:
            shares = _changed(shares, entry.weights)
        except DataError as error:
            raise DataError(f"data.schedule[{n}]: {error}") from None
        phases.append(Phase(first, shares.of_sources(), "schedule"))
    caps = {
        name: next((c for c in (source.max_epochs, _max_epochs(d, name), d.max_epochs) if c is not None), None)
        for name, source in d.sources.items()
    }
    return Asked(tuple(phases), caps, d.exhausted)


def _max_epochs(cfg: DataConfig, source: str) -> float | None:
    domain = cfg.domains.get(cfg.sources[source].domain or source)
    return domain.max_epochs if domain else None


def _first_shares(cfg: DataConfig, tokens: Mapping[str, int], budget: int) -> _Shares:
    """The shares before any schedule. ``budget``: training tokens of the run."""
    members: dict[str, list[str]] = {}
    for source, domain in domains_of(cfg).items():
        members.setdefault(domain, []).append(source)
    inside, given, sizes = {}, {}, {}
    for domain, names in members.items():
        own = {name: cfg.sources[name].weight for name in names}
        group = cfg.domains.get(domain)
        given[domain] = group.weight if group else None
        if len(names) == 1:  # a source that is alone has the domain's weight
            given[domain] = own[names[0]] if given[domain] is None else given[domain]
            own = dict.fromkeys(names, None)
        elif all(weight == 0 for weight in own.values()):
            given[domain], own = 0.0, dict.fromkeys(names, None)
        try:
            inside[domain] = resolve_weights(own, {name: tokens[name] for name in names})
        except DataError as error:
            raise DataError(f"sources of domain '{domain}': {error}") from None
        sizes[domain] = sum(tokens[name] for name in names if inside[domain][name] > 0)
    return _Shares(_by_rule(cfg, given, sizes, budget), inside)


def _by_rule(
    cfg: DataConfig, given: Mapping[str, float | None], sizes: Mapping[str, int], budget: int
) -> dict[str, float]:
    """Shares of domains by ``cfg.mixture``."""
    if cfg.mixture == "given":
        return resolve_weights(given, sizes)
    used = {name: float(size) for name, size in sizes.items() if given[name] != 0}
    if not used:
        return resolve_weights(given, sizes)  # refuses
    if cfg.mixture == "unimax":
        found = unimax_weights(used, budget, cfg.unimax_epochs)
    elif cfg.mixture == "uniform":
        found = dict.fromkeys(used, 1 / len(used))
    else:
        found = temperature_weights(used, cfg.temperature if cfg.mixture == "temperature" else 1.0)
    return {name: found.get(name, 0.0) for name in sizes}


def _changed(shares: _Shares, given: Mapping[str, float]) -> _Shares:
    """``shares`` with those of some domains changed, and those of some sources within their domains; a source that is
    alone in its domain stands for that."""
    alone = {names[0]: domain for domain, now in shares.inside.items() if len(names := list(now)) == 1}
    given = {name if name in shares.domains else alone.get(name, name): weight for name, weight in given.items()}
    domains = {name: weight for name, weight in given.items() if name in shares.domains}
    inside = {
        domain: change_weights({n: given[n] for n in now if n in given and n not in domains}, now)
        for domain, now in shares.inside.items()
    }
    return _Shares(change_weights(domains, shares.domains), inside)
