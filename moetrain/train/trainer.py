"""The training loop. Reads from top to bottom: build everything, take steps, look, save."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.checkpoint import Checkpointer, seed_step
from moetrain.config import to_dict
from moetrain.config.check import Sizes
from moetrain.config.schema import Config
from moetrain.data.forecast import why_end
from moetrain.data.loader import Batch
from moetrain.data.position import position
from moetrain.model.count import count_parameters, flops_per_token
from moetrain.moe.balance import Loads
from moetrain.optim.schedule import lr_factor
from moetrain.parallel.mesh import ParallelDims
from moetrain.train import begin, runtime
from moetrain.train.engine import build_engine
from moetrain.train.evaluate import Evaluation, evaluate
from moetrain.train.guard import Guard
from moetrain.train.metrics import Meter, compression_metrics, load_metrics, number
from moetrain.train.mixing import Mixing
from moetrain.train.preflight import open_data, open_loader, open_sampler
from moetrain.train.replicas import Checks
from moetrain.train.routing import RoutingWatch
from moetrain.train.sinks import Writer
from moetrain.train.snapshots import open_snapshots
from moetrain.train.spans import Spans
from moetrain.train.step import Accept, StepFigures, bad_step
from moetrain.train.trace import Tracer

log = logging.getLogger("moetrain")


class Trainer:
    """One run on one rank. ``step`` counts finished optimizer steps; all other state follows from the config and it."""

    def __init__(self, cfg: Config, sizes: Sizes, run_dir: Path) -> None:
        self.cfg, self.run_dir = cfg, run_dir
        self.device = runtime.pick_device(cfg.device)
        self.dims = ParallelDims.build(sizes, self.device.type)
        self.data = open_data(cfg)
        self.sampler, self.asked = open_sampler(cfg, self.data)
        self.loader = open_loader(cfg, self.dims, self.data, self.sampler, self.device)
        self.engine = build_engine(cfg, self.dims, self.device)
        self.mixing = Mixing(cfg, self.engine, self.loader, self.dims)
        self.peak_lr: float = cfg.optim.lr
        self.checkpointer = Checkpointer(run_dir / "checkpoints", cfg.checkpoint.keep, cfg.checkpoint.asynchronous)
        self.snapshots = open_snapshots(cfg, sizes, run_dir, self.engine)
        self.guard = Guard(cfg.faults, skips=cfg.parallel.engine == "torch")
        self.checks = Checks(weights=cfg.parallel.engine == "torch")
        self.parameters = count_parameters(cfg.model)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.waited_s = 0.0  # of them, for data
        self.last_loads = Loads({}, {})
        self.events: list[dict[str, Any]] = []  # what the next line of metrics tells beside figures

    def start(self) -> None:
        """Begin at step 0: see ``begin``."""
        begin.start(self)

    def resume(self) -> None:
        """Go on from where the run was left: see ``begin``."""
        begin.resume(self)

    @property
    def last_step(self) -> int:
        """Steps of the whole run: ``train.steps``, or fewer where the data runs out before."""
        end = self.sampler.end
        return self.cfg.train.steps if end is None else min(self.cfg.train.steps, self.loader.step_of(end))

    def fit(self) -> Evaluation | None:
        """Train until ``last_step``, then evaluate; None where a signal stopped the run before, its state saved.
        Raises TrainError when too many batches in a row are bad."""
        cfg = self.cfg
        writer = Writer(cfg, self.run_dir, to_dict(cfg), self.step, dist.get_rank())
        flops = flops_per_token(cfg.model, cfg.train.seq_len)
        peak = runtime.peak_tflops(self.device, cfg.log.peak_tflops)
        meter = Meter(self.device, flops, peak, dist.get_world_size())
        tracer = Tracer(cfg.model, self.run_dir) if cfg.train.trace else None
        spans = Spans(cfg, self.engine, self.device, self.run_dir)
        evaluation = None
        while self.step < self.last_step and not self.guard.stop:
            with spans.step(self.step + 1):
                metrics = self.train_step()
            meter.add(metrics.pop("step_tokens"), metrics["step_s"])
            writer.count(self.step, self.last_loads)
            if tracer is not None:
                tracer.count(self.step, self.last_loads)

            done, stop = self.step == self.last_step, self.guard.stop
            if self._due(cfg.train.eval_every) or done:
                watch = RoutingWatch(self.engine.model, cfg.model, self.data, self.dims, cfg.train.seq_len)
                with watch.on():
                    evaluation = self.evaluate(watch=watch)
                metrics |= evaluation.metrics() | watch.collect(self.step, self.run_dir)
            saves = self._due(cfg.checkpoint.every) or (cfg.checkpoint.at_end and done) or stop > 0
            metrics |= self._told(saves)
            if self._due(cfg.log.every):
                metrics |= compression_metrics(self.engine.model, cfg)
            if self._due(cfg.log.every) or metrics.keys() & {"val_loss", "mixture", "events"}:
                metrics |= spans.read(metrics["step_s"], metrics["data_wait_s"])
                writer.write(self.step, metrics | meter.read() | self.read() | load_metrics(self.last_loads))
            if (saves or self._due(cfg.faults.checksum_every)) and cfg.faults.checksum_every:
                self.checks.run(self.engine.model, self.step, self.checkpointer.last_good())
            if tracer is not None and (saves or done):
                tracer.flush()
            if saves:
                self.checkpointer.save(self.step, self.engine.state(self.progress()))
            if self._due(self.snapshots.every) and not done:
                self.snapshots.take(self.step, self.engine, self.progress(), self.checkpointer.last_good_step())
        self.checkpointer.wait()
        if self.step not in self.checkpointer.failed:
            self.snapshots.forget()
        self.loader.close()
        writer.close()
        if self.step < self.last_step:
            return None
        if self.step < cfg.train.steps:
            log.info("data       has run out after step %d of %d: %s", self.step, cfg.train.steps, why_end(self.loader))
        return evaluation or self.evaluate()

    def evaluate(self, document_mask: bool | None = None, watch: RoutingWatch | None = None) -> Evaluation:
        """Loss on the held-out text of every domain. document_mask: None: as ``data.document_mask`` says."""
        t, masked = self.cfg.train, self.cfg.data.document_mask if document_mask is None else document_mask
        lengths = t.seq_len, t.micro_batch, t.eval_sequences
        return evaluate(self.engine, self.data, *lengths, self.dims, self.step, masked, watch=watch)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; its figures by name, of the whole model. Raises TrainError when it and those before it
        were bad."""
        cfg, step = self.cfg, self.step
        mixed = self.mixing.before_step(step, self.last_step - step)
        began = time.perf_counter()
        self.guard.begin(self.sampler.history.index(self.loader.first_sample(step)))
        schedule = lr_factor(cfg.schedule, step, cfg.train.steps)
        for skipped in self.guard.due(step):
            samples = skipped.samples
            again = self._runs(self.loader.again(samples), skipped.step, schedule)
            self.events += self.guard.again(skipped, step, again)
        batches = self.loader.step(step)
        waited = time.perf_counter() - began
        factor, samples = schedule * self.guard.lr_factor(step), self.loader.sample_ids(step)
        run = self._runs(batches, step, factor)
        figures, events = self.guard.attempt(step, samples, run)
        self.events += events
        if self.guard.exhausted:
            self.checkpointer.wait()
            raise bad_step(self.guard.why, step, samples, self.guard.in_a_row, self.checkpointer.last_good())
        self.last_loads = figures.loads
        self.step += 1
        self.tokens += figures.tokens
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.waited_s += waited
        aux = {name: number(value) for name, value in figures.aux.items()}
        padding = {} if cfg.data.packing == "cut" else {"padding_share": 1 - figures.targets / figures.tokens}
        return {"step": self.step, "tokens": self.tokens, "loss": number(figures.loss),
                "grad_norm": number(figures.grad_norm), "lr": self.peak_lr * factor, **aux,
                "step_s": seconds, "data_wait_s": waited,
                "step_tokens": figures.tokens, **padding, **mixed}  # fmt: skip

    def read(self) -> dict[str, Any]:
        """Sequences of each domain that the run has read so far."""
        found, domain_of = dict.fromkeys(self.data.domains, 0), self.data.domain_of
        for source, count in self.sampler.dealer.counts(self.loader.first_sample(self.step)).items():
            found[domain_of[source]] += count
        return {"read_by_domain": found}

    def _runs(self, batches: list[Batch], seed_of: int, factor: float) -> Callable[..., StepFigures]:
        """What computes the step in hand on ``batches``, with the random numbers of step ``seed_of``."""

        def run(accept: Accept, lower: float = 1.0) -> StepFigures:
            seed_step(self.cfg.seed, seed_of, dist.get_rank())
            return self.engine.train_step(batches, self.step, factor * lower, accept)

        return run

    def _told(self, saves: bool) -> dict[str, Any]:
        """The events since the last line of metrics, under their key; nothing where there are none."""
        told, self.events = self.events, []
        if self.guard.stop:
            told.append({"event": "stopped", "step": self.step, "signal": signal.Signals(self.guard.stop).name})
        if saves:
            told.append({"event": "save", "step": self.step})
        return {"events": told} if told else {}

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors."""
        data = position(self.sampler, self.asked, self.loader.first_sample(self.step))
        counts = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "data_wait_s": self.waited_s}
        return {**counts, "data": data, "mixer": self.mixing.state(), "guard": self.guard.state()}
