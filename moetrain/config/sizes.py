"""The sizes of one mapping, and how they follow from the config and the number of ranks. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.config.errors import ConfigError
from moetrain.config.schema import Config, ParallelConfig

DENSE_GRID = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_GRID = ("pp", "edp", "ep", "etp")

# Stages that a rank may hold under each schedule: (fewest, most).
STAGES_PER_RANK: dict[str, tuple[int, int | None]] = {
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved_1f1b": (2, None),
    "interleaved_zero_bubble": (2, None),
    "zbv_zero_bubble": (2, 2),
    "dualpipev": (2, 2),
}
# Schedules that compute the gradients of weights apart from those of inputs.
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")
# Schedules whose stages go through the ranks and back, so that a rank holds stages i and 2 pp - 1 - i.
V_SHAPED = ("zbv_zero_bubble", "dualpipev")


@dataclass(frozen=True)
class Sizes:
    """One mapping: the sizes of both grids over the same ranks, all known.

    world = pp x dp_replicate x dp_shard x cp x tp = pp x edp x ep x etp, each written slowest first.
    stages_per_rank: pipeline stages that each rank holds (virtual stages).
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    edp: int = 1
    ep: int = 1
    etp: int = 1
    stages_per_rank: int = 1

    @property
    def world(self) -> int:
        """Ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data(self) -> int:
        """Shares that the global batch is cut into; ranks along cp and tp and the stages of pp work on one share."""
        return self.dp_replicate * self.dp_shard

    @property
    def stages(self) -> int:
        """Pipeline stages of the model."""
        return self.pp * self.stages_per_rank

    def micro_batches(self, cfg: Config) -> int:
        """Micro-batches of a step on each data rank."""
        return cfg.train.global_batch // (cfg.train.micro_batch * self.data)

    def local_tokens(self, cfg: Config) -> int:
        """Tokens of one micro-batch on one rank, between blocks: T of the MoE layers."""
        return cfg.train.micro_batch * cfg.train.seq_len // (self.cp * self.tp)

    def reshards(self, parallel: ParallelConfig) -> bool:
        """``parallel.reshard_after_forward``, decided: null is true, but not in a pipeline, where every micro-batch
        would gather weights again, of which backward keeps all."""
        asked = parallel.reshard_after_forward
        return self.pp == 1 if asked is None else asked

    def rank_of_stage(self, stage: int, schedule: str) -> int:
        """The pipeline rank (0 to pp - 1) that holds ``stage`` (0 to stages - 1) under ``parallel.schedule``."""
        turn, place = divmod(stage, self.pp)
        return self.pp - 1 - place if schedule in V_SHAPED and turn % 2 else place

    def stages_of_rank(self, pp_rank: int, schedule: str) -> list[int]:
        """The stages that pipeline rank ``pp_rank`` holds, in order."""
        return [stage for stage in range(self.stages) if self.rank_of_stage(stage, schedule) == pp_rank]


def resolve_sizes(parallel: ParallelConfig, world: int) -> Sizes:
    """The mapping of ``parallel`` on ``world`` ranks, with -1, edp and stages_per_rank inferred.

    Raises ConfigError with the rule that broke, the sizes and the nearest legal ones, where no mapping fits.
    """
    if world < 1:
        raise ConfigError(f"a world of {world} ranks is impossible")
    for name in (*DENSE_GRID, "ep", "etp"):
        size = getattr(parallel, name)
        if size < 1 and size != -1:
            raise ConfigError(f"parallel.{name}={size}: a size is at least 1, or -1 to infer it")
    dense = _infer({name: getattr(parallel, name) for name in DENSE_GRID}, world, f"world size {world}")
    stage = world // dense["pp"]
    what = f"world size {world}" if dense["pp"] == 1 else f"world size {world} / pp {dense['pp']} = {stage}"
    edp = 1 if -1 in (parallel.ep, parallel.etp) else -1
    experts = _infer({"edp": edp, "ep": parallel.ep, "etp": parallel.etp}, stage, what)
    default = STAGES_PER_RANK[parallel.schedule][0] if dense["pp"] > 1 else 1
    return Sizes(**dense, **experts, stages_per_rank=parallel.stages_per_rank or default)


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def near(size: int, legal: Sequence[int]) -> list[int]:
    """The nearest legal number below ``size`` and the nearest above, where they exist."""
    below, above = [n for n in legal if n < size], [n for n in legal if n > size]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _infer(sizes: dict[str, int], total: int, what: str) -> dict[str, int]:
    """``sizes`` with its one -1 filled in, such that their product is ``total``, which the message calls ``what``."""
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ConfigError(
            f"parallel: only one of {', '.join(sizes)} can be inferred, but {' and '.join(unknown)} are -1"
        )
    known = {name: size for name, size in sizes.items() if size != -1}
    product = math.prod(known.values())
    if total % product or (not unknown and product != total):
        shown = " x ".join(f"{name} {size}" for name, size in known.items())
        raise ConfigError(
            f"parallel: {shown} = {product} must {'divide' if unknown else 'equal'} the {what} (launch.nodes x "
            f"launch.ranks, or the ranks that a launcher started); {_single_changes(known, total, bool(unknown))}"
        )
    return {name: total // product if size == -1 else size for name, size in sizes.items()}


def _single_changes(known: dict[str, int], total: int, divides: bool) -> str:
    """The nearest legal choices: one size changed, or another number of ranks."""
    product = math.prod(known.values())
    changes = []
    for name, size in known.items():
        if name == "edp" or (size == 1 and name != "dp_shard"):
            continue
        rest = product // size
        legal = [n for n in divisors(total) if (total % (rest * n) == 0 if divides else rest * n == total)]
        changes += [f"parallel.{name}={n}" for n in near(size, legal)]
    ranks = f"a multiple of {product} ranks" if divides else f"a world of {product}"
    return f"nearest legal: {', '.join([*changes, ranks])}"
