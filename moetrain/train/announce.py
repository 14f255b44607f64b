"""What a run says before its first step: mapping, parameters, memory, tokens."""

from __future__ import annotations

import logging

from moe_kernels import ACTIVATIONS
from torch.distributed.tensor import DTensor

from moetrain.config.schema import Config
from moetrain.data.forecast import describe, warnings
from moetrain.data.packing import padding
from moetrain.moe.dispatch.lsh import LshOptions
from moetrain.parallel.freeze import frozen_sizes
from moetrain.parallel.stages import all_stages
from moetrain.train.kernels import attention_kernel, expert_kernels
from moetrain.train.trainer import Trainer

log = logging.getLogger("moetrain")

MUCH_PADDING = 0.1


def announce(trainer: Trainer) -> None:
    """Log the plan of the run, a few lines."""
    cfg, s, n = trainer.cfg, trainer.dims.sizes, trainer.parameters
    t = cfg.train
    accumulate = t.global_batch // (t.micro_batch * trainer.dims.data_size)
    state = state_gib(trainer)
    log.info("run        %s (seed %d, %s, %s)", trainer.run_dir, cfg.seed, trainer.device.type, t.precision)
    log.info("mapping    pp %d x dp %dx%d x cp %d x tp %d | pp %d x edp %d x ep %d x etp %d",
             s.pp, s.dp_replicate, s.dp_shard, s.cp, s.tp, s.pp, s.edp, s.ep, s.etp)  # fmt: skip
    if s.pp > 1:
        stages = all_stages(cfg, s)
        held = " | ".join(f"{stage.layers.start}-{stage.layers.stop - 1}" for stage in stages)
        log.info("pipeline   %s, %d stages of layers %s", cfg.parallel.schedule, len(stages), held)
    log.info("model      %s: %s parameters, %s active per token", cfg.model.name, short(n.total), short(n.active))
    if cfg.train.freeze:
        trained = n.total - sum(frozen_sizes(cfg, s).values())
        log.info("frozen     %s: %s of %s parameters are trained", ", ".join(cfg.train.freeze), short(trained),
                 short(n.total))  # fmt: skip
    a = cfg.model.attention
    if a.num_experts > 1:
        log.info("attention  %d experts of %d heads each, keys and values %s",
                 a.num_experts, a.n_heads // a.num_experts, "shared" if a.shared_kv else "their own")  # fmt: skip
    if (found := attention_kernel(cfg, trainer.device)) is not None:
        log.info("attention  kernel %s: %s", *found)
    if cfg.model.moe_layers():
        name, why = expert_kernels(cfg, trainer.device)
        in_fp8 = " in FP8" if cfg.experts.fp8 else ""
        log.info("experts    kernels %s%s: %s", name, in_fp8, why)
        if isinstance(cfg.dispatch, LshOptions):
            log.warning("%s", lsh(cfg.dispatch, s.ep))
    log.info("memory     per rank: weights, gradients and optimizer %.2f GiB, activations about %.2f GiB",
             state, activation_gib(cfg))  # fmt: skip
    log.info("snapshots  %s", trainer.snapshots.describe())
    log.info("data       %s: %s", cfg.data.name, ", ".join(trainer.data.describe()))
    for level, line in packing(trainer):
        log.log(level, "%s", line)
    for number, line in enumerate(describe(trainer.loader, trainer.step, t.steps)):
        log.info("%s %s", " " * 10 if number else "mixture   ", line)
    for line in warnings(trainer.loader, t.steps):
        log.warning("           %s", line)
    if trainer.mixing.mixer is not None:
        log.info("mixer      %s", trainer.mixing.describe())
    log.info("tokens     %d steps x %d sequences x %d = %s (%d micro-batches a step and rank)",
             t.steps, t.global_batch, t.seq_len, short(t.steps * t.global_batch * t.seq_len), accumulate)  # fmt: skip


def lsh(options: LshOptions, ep: int) -> str:
    """What dispatch=lsh does to the run, in one line."""
    kept = "their distances from it are added back" if options.residual else "what sets them apart is lost"
    alone = "; parallel.ep=1, so no traffic is saved" if ep == 1 else ""
    return (f"dispatch   lsh changes the function while training: rows that agree in {options.hashes} hashes share one "
            f"output, {kept}; means hold later tokens too, so loss is too low, val_loss is not{alone}")  # fmt: skip


def packing(trainer: Trainer) -> list[tuple[int, str]]:
    """What best-fit packing makes of the data: lines with the level to log them at; none without it."""
    sampler, seq_len = trainer.sampler, trainer.cfg.train.seq_len
    weights = sampler.history.at(trainer.loader.first_sample(trainer.step)).weights
    found = padding(sampler.windows, weights, seq_len)
    if found is None:
        return []
    lines = [(logging.INFO, f"packing    best_fit: {found.windows:,} windows of {seq_len:,} tokens, "
              f"{100 * found.share:.3g}% padding; {found.cut:,} longer documents are cut")]  # fmt: skip
    if found.share > MUCH_PADDING:
        lines.append((logging.WARNING, f"           {100 * found.share:.0f}% of every step is padding: there is too "
                      f"little text for train.seq_len={seq_len}; use a shorter one, or data.packing=cut"))  # fmt: skip
    return lines


def state_gib(trainer: Trainer) -> float:
    """GiB that this rank's shards take: weights and, of trained ones, gradients and two optimizer moments, each as wide
    as the weight."""
    total = 0
    for p in trainer.engine.model.parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        total += (4 if p.requires_grad else 1) * local.numel() * local.element_size()
    return total / 2**30


def activation_gib(cfg: Config) -> float:
    """Rough GiB of activations of one micro-batch, balanced routing, without recompute: per token and layer the block's
    inputs and norms (6 D), attention (3 heads' widths and their output), the routed pre-activations and rows
    (k (2 D + 3 F), or 2 F with a plain activation), and the logits' hidden state. The planner will do better; this is
    an order of magnitude."""
    m, t = cfg.model, cfg.train
    width = {"float64": 8, "float32": 4, "bf16": 2}[t.precision]
    heads = m.attention.n_heads * (m.attention.v_head_dim if m.attention.kind == "mla" else m.attention.head_dim)
    dense, routed = (ACTIVATIONS[name].matrices + 1 for name in (m.activation, m.moe.activation))
    per_token = 0
    for layer in range(m.n_layers):
        per_token += 6 * m.dim + 4 * heads
        if m.is_moe(layer):
            k, f = m.layer_value("top_k", layer), m.layer_value("expert_dim", layer)
            per_token += k * (2 * m.dim + routed * f) + dense * m.layer_value("shared_dim", layer)
        else:
            per_token += dense * m.dense_dim
    if t.recompute == "full":
        per_token = m.n_layers * m.dim
    return t.micro_batch * t.seq_len * per_token * width / 2**30


def short(n: float) -> str:
    """A count as people write it: 3.2M, 46.7B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(int(n))
