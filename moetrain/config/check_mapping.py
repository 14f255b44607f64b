"""What a mapping must fulfil for its model and batch, checked before any process group exists. No torch.

Each rule is a function that yields what it finds broken. A new rule is one more function in ``RULES``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from moetrain.config.advice import Broken, Rule, enforce
from moetrain.config.check_deepspeed import check_deepspeed
from moetrain.config.check_placement import placement
from moetrain.config.errors import ConfigError
from moetrain.config.schema import PLAIN, Config
from moetrain.config.sizes import STAGES_PER_RANK, Sizes, divisors, resolve_sizes


def check_mapping(cfg: Config, world: int) -> Sizes:
    """The mapping of ``cfg`` on ``world`` ranks, checked against the model and the batch.

    Raises ConfigError with the rule that broke, the sizes, and the nearest choices that mend it.
    """
    sizes = resolve_sizes(cfg.parallel, world)
    check_deepspeed(cfg, sizes)
    enforce(RULES, cfg, sizes)
    return sizes


def refuse_nodes(cfg: Config) -> None:
    """Raise ConfigError for a run of several machines, where its ranks are to start on this one."""
    if cfg.launch.nodes > 1:
        raise ConfigError(
            f"launch.nodes={cfg.launch.nodes}: 'moetrain train' starts ranks on this machine alone; 'moetrain launch' "
            "with the same words starts a run on several, or set launch.nodes=1"
        )


def _sizes(sizes: Sizes, *names: str) -> dict[str, Sequence[int]]:
    """Every size that ``names`` of the grids could have."""
    return {f"parallel.{name}": divisors(sizes.world) for name in names}


def stages_per_rank(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """A schedule runs so many stages on a rank."""
    n, schedule = sizes.stages_per_rank, cfg.parallel.schedule
    if sizes.pp == 1:
        if n > 1:
            yield Broken(
                f"parallel.stages_per_rank={n} needs a pipeline, but parallel.pp=1",
                {"parallel.stages_per_rank": [1], **_sizes(sizes, "pp")},
            )
        return
    fewest, most = STAGES_PER_RANK[schedule]
    if n < fewest or (most is not None and n > most):
        takes = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        schedules = [name for name, (low, high) in STAGES_PER_RANK.items() if low <= n <= (high or n)]
        yield Broken(
            f"parallel.schedule={schedule} takes {takes} stages on each rank, not parallel.stages_per_rank={n}",
            {"parallel.stages_per_rank": [fewest], "parallel.schedule": schedules},
        )


def layers_of_stages(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """Every stage has a layer."""
    layers = cfg.model.n_layers
    if sizes.stages > layers:
        yield Broken(
            f"{_stages(sizes)} for model.n_layers={layers} layers: some stage would have no layer",
            {**_sizes(sizes, "pp"), "parallel.stages_per_rank": range(1, sizes.stages_per_rank)},
        )


def layout(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """An explicit layout says how many layers each stage has."""
    layout, layers = cfg.parallel.layout, cfg.model.n_layers
    if layout is None:
        return
    change: dict[str, Sequence[object]] = {"parallel.layout": [None]}
    if len(layout) != sizes.stages:
        yield Broken(
            f"parallel.layout={layout} has {len(layout)} numbers, but the mapping has {_stages(sizes)}",
            {**change, **_sizes(sizes, "pp")},
        )
    if min(layout, default=0) < 1:
        yield Broken(f"parallel.layout={layout}: every stage needs at least 1 layer", change)
    if sum(layout) != layers:
        yield Broken(
            f"parallel.layout={layout} has {sum(layout)} layers, the model has model.n_layers={layers}", change
        )


def micro_batches(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """What each schedule of torch.distributed.pipelining demands of their number (torch 2.13, schedules.py)."""
    if sizes.pp == 1:
        return
    n, pp, schedule = sizes.micro_batches(cfg), sizes.pp, cfg.parallel.schedule
    if schedule in ("1f1b", "dualpipev") and n < sizes.stages:
        rule = f"at least as many micro-batches as stages, {sizes.stages}"
    elif schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and n % max(1, n // pp):
        rule = f"a number of micro-batches that divides by {n // pp} rounds (micro-batches / parallel.pp={pp}, rounded)"
    else:
        return
    step, batch = cfg.train.micro_batch * sizes.data, cfg.train.global_batch
    most = max(batch, step * sizes.stages) + step * pp
    yield Broken(
        f"parallel.schedule={schedule} needs {rule}, but train.global_batch={batch} / (train.micro_batch="
        f"{cfg.train.micro_batch} x {sizes.data} data-parallel ranks) = {n}",
        {
            "train.global_batch": range(step, most + 1, step),
            "train.micro_batch": divisors(batch // sizes.data),
            "parallel.schedule": list(STAGES_PER_RANK),
        },
    )


def attention_heads(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """Tensor parallel ranks own whole heads."""
    a, tp = cfg.model.attention, sizes.tp
    if a.n_heads % tp:
        yield Broken(
            f"parallel.tp={tp} must divide model.attention.n_heads={a.n_heads}, since every rank owns whole heads",
            _sizes(sizes, "tp"),
        )
        return
    kv_heads = a.n_kv_heads if a.kind == "gqa" else a.n_heads
    if kv_heads % tp and tp % kv_heads:
        yield Broken(
            f"parallel.tp={tp} must divide model.attention.n_kv_heads={kv_heads}, or be a multiple of it, so that "
            "ranks share out or repeat whole key/value heads",
            _sizes(sizes, "tp"),
        )


def traded_heads(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """all_to_all context parallelism shares out a rank's heads further."""
    a, tp, cp = cfg.model.attention, sizes.tp, sizes.cp
    if cfg.parallel.context == "all_to_all" and (a.n_heads // tp) % cp:
        per_rank = f" / parallel.tp={tp} = {a.n_heads // tp}" if tp > 1 else ""
        yield Broken(
            f"parallel.context=all_to_all trades heads, so parallel.cp={cp} must divide "
            f"model.attention.n_heads={a.n_heads}{per_rank}",
            {**_sizes(sizes, "cp"), "parallel.context": ["all_gather", "ring"]},
        )


def whole_sequences(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """Attention kernels that take documents one after the other want all of their tokens."""
    asked, context = cfg.model.attention.backend, cfg.parallel.context
    if sizes.cp > 1 and asked in ("flash", "flex") and context != "all_to_all":
        yield Broken(
            f"model.attention.backend={asked} needs whole sequences, of which each rank has a part under "
            f"parallel.cp={sizes.cp} and parallel.context={context}",
            {"parallel.context": ["all_to_all"], "model.attention.backend": ["auto", "sdpa"], "parallel.cp": [1]},
        )


def split_widths(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """What else tensor parallelism splits."""
    model, tp = cfg.model, sizes.tp
    widths = [("model.vocab_size", model.vocab_size)]
    if len(model.moe_layers()) < model.n_layers:
        widths.append(("model.dense_dim", model.dense_dim))
    widths += [("model.moe.shared_dim", n) for n in _layer_values(cfg, "shared_dim")]
    for name, width in widths:
        if width % tp:
            yield Broken(f"parallel.tp={tp} must divide {name}={width}", _sizes(sizes, "tp"))


def sequence(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """Context parallelism cuts a sequence into 2 cp chunks (one from each end for a rank), tp cuts a rank's part on."""
    n, cp, tp, longest = cfg.train.seq_len, sizes.cp, sizes.tp, cfg.model.max_seq_len
    if cp > 1 and n % (2 * cp):
        yield Broken(
            f"train.seq_len={n} must be a multiple of 2 x parallel.cp={cp} = {2 * cp}: a rank takes a chunk from each "
            "end of the sequence",
            {"train.seq_len": _multiples_around(n, math.lcm(2 * cp, cp * tp), longest), **_sizes(sizes, "cp")},
        )
    elif (n // cp) % tp:
        own = f" / parallel.cp={cp} = {n // cp}" if cp > 1 else ""
        yield Broken(
            f"train.seq_len={n}{own} must be a multiple of parallel.tp={tp}: between blocks each rank holds a part of "
            "the sequence",
            {"train.seq_len": _multiples_around(n, math.lcm(2 * cp, cp * tp), longest), **_sizes(sizes, "tp")},
        )


def experts_over_ranks(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """Every expert parallel rank owns as many experts as the others."""
    ep = sizes.ep
    for count in _layer_values(cfg, "num_experts"):
        if ep > count:
            yield Broken(
                f"parallel.ep={ep} is more ranks than model.moe.num_experts={count}: some would own no expert",
                _sizes(sizes, "ep"),
            )
        elif count % ep:
            yield Broken(
                f"parallel.ep={ep} must divide model.moe.num_experts={count}, since every rank owns as many experts "
                "as the others",
                _sizes(sizes, "ep"),
            )


def split_experts(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """Every expert tensor parallel rank owns a part of each expert."""
    etp, dim = sizes.etp, cfg.model.dim
    for width in _layer_values(cfg, "expert_dim"):
        if width % etp:
            yield Broken(f"parallel.etp={etp} must divide model.moe.expert_dim={width}", _sizes(sizes, "etp"))
    if cfg.model.moe_layers() and cfg.model.moe.bias and dim % etp:
        yield Broken(
            f"parallel.etp={etp} must divide model.dim={dim}, since the experts have biases", _sizes(sizes, "etp")
        )


def expert_shards(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """FSDP splits each expert's parameters over edp, along a dimension that divides as far as etp leaves it."""
    edp, etp, dim = sizes.edp, sizes.etp, cfg.model.dim
    for width in _layer_values(cfg, "expert_dim"):
        # Of the weights (F, D) and (D, F), etp splits F; of the biases (2, F), (1, F) if plain, and (D), F and D.
        choices, matrices = [[dim, width // etp]], 1 if cfg.model.moe.activation in PLAIN else 2
        choices += [[matrices, width // etp], [dim // etp]] if cfg.model.moe.bias else []
        if all(any(size % edp == 0 for size in sizes_of_one) for sizes_of_one in choices):
            continue
        split = f" / parallel.etp={etp}" if etp > 1 else ""
        widths = f"model.dim={dim} or model.moe.expert_dim={width}{split}"
        if cfg.model.moe.bias:
            widths = f"model.dim={dim}{split} and model.moe.expert_dim={width}{split}, since the experts have biases"
        yield Broken(
            f"experts are sharded over edp={edp} ranks (world / pp / ep / etp), which must divide {widths}",
            _sizes(sizes, "ep", "etp", "pp"),
        )


def dispatcher(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """The local dispatcher reaches no other rank but those that have parts of the same experts."""
    kind = cfg.dispatch.get("kind") if isinstance(cfg.dispatch, dict) else None
    if kind == "local" and sizes.ep > 1:
        yield Broken(
            f"dispatch.kind=local serves ranks that have all experts, or a part of each, not parallel.ep={sizes.ep}",
            {"dispatch.kind": ["auto", "all_to_all"], **_sizes(sizes, "ep")},
        )


def batch(cfg: Config, sizes: Sizes) -> Iterator[Broken]:
    """A step is whole micro-batches on every data-parallel rank."""
    total, micro, data = cfg.train.global_batch, cfg.train.micro_batch, sizes.data
    step = micro * data
    if total % step:
        ranks = f" x {data} data-parallel ranks = {step}" if data > 1 else ""
        smaller = [n for n in divisors(total // data) if n < micro] if total % data == 0 else []
        yield Broken(
            f"train.global_batch={total} must be a multiple of train.micro_batch={micro}{ranks}",
            {
                "train.global_batch": range(step, total + 4 * sizes.stages * step, step),
                "train.micro_batch": smaller,
            },
        )


def _stages(sizes: Sizes) -> str:
    return f"parallel.pp={sizes.pp} x {sizes.stages_per_rank} stages per rank = {sizes.stages} stages"


def _layer_values(cfg: Config, name: str) -> list[int]:
    """The values of ``model.moe.<name>`` in MoE layers, each once, ascending, without 0."""
    values = {cfg.model.layer_value(name, layer) for layer in cfg.model.moe_layers()}
    return sorted(values - {0})


def _multiples_around(n: int, step: int, most: int) -> list[int]:
    return [m for m in (n // step * step, -(-n // step) * step) if 0 < m <= most]


# The batch comes before the micro-batches, whose number it fixes.
RULES: list[Rule] = [
    stages_per_rank,
    layers_of_stages,
    layout,
    attention_heads,
    traded_heads,
    whole_sequences,
    split_widths,
    sequence,
    experts_over_ranks,
    split_experts,
    expert_shards,
    dispatcher,
    placement,
    batch,
    micro_batches,
]
