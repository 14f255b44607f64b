"""What routers do on held-out text, watched while it is evaluated: how sure they are, and where some tokens go.

Costs a count and an entropy per layer and batch, and nothing while training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.comm.ranks import Ranks
from moetrain.config.schema import ModelConfig
from moetrain.data.dataset import TokenData
from moetrain.data.loader import Batch
from moetrain.moe.layer import MoELayer
from moetrain.parallel.mesh import ParallelDims

log = logging.getLogger("moetrain")

# Tokens whose experts are kept, of all ranks together: enough for shares of domains and of frequent tokens.
SAMPLE = 16384


class RoutingWatch:
    """Watches the routers of ``model`` through one evaluation. All numbers are of the layers and tokens of this rank
    until ``collect``. Shapes: L MoE layers of the whole model, G domains, E the most experts of a layer."""

    def __init__(self, model: nn.Module, cfg: ModelConfig, data: TokenData, dims: ParallelDims, seq_len: int) -> None:
        self.layers = cfg.moe_layers()
        self.experts = [cfg.layer_value("num_experts", i) for i in self.layers]
        self.data, self.dims, self.seq_len = data, dims, seq_len
        self.routers: dict[int, Any] = {
            int(name.split(".")[1]): m.router for name, m in model.named_modules() if isinstance(m, MoELayer)
        }
        device = torch.device(dims.dense.device_type)  # offloaded parameters are elsewhere
        L, G, E = len(self.layers), len(data.domains), max(self.experts, default=0)
        self.counts_LGE = torch.zeros(L, G, E, dtype=torch.int64, device=device)
        self.entropy_L = torch.zeros(L, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        self.tokens_L = torch.zeros(L, dtype=torch.int64, device=device)
        self.sample: dict[int, dict[int, tuple[int, np.ndarray]]] = {i: {} for i in self.layers}
        # Some places of some windows of each source, the same at every evaluation
        self.stride = max(1, -(-seq_len * len(data.sources) // SAMPLE))
        self.windows = max(1, SAMPLE // (len(data.sources) * -(-seq_len // self.stride)))
        self.domain, self.valid_T, self.keys_T, self.token_T = 0, torch.zeros(0), torch.zeros(0), torch.zeros(0)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The routers tell what they do meanwhile, outside training."""
        for layer, router in self.routers.items():
            router.watch = partial(self._see, layer)
        try:
            yield
        finally:
            for router in self.routers.values():
                router.watch = None

    def begin(self, source: int, batch: Batch) -> None:
        """The next forward pass is over ``batch``, of the source of this number."""
        index_S = self.dims.own_index(self.seq_len)
        device = self.counts_LGE.device
        self.domain = self.data.domains.index(self.data.domain_of[self.data.sources[source]])
        self.valid_T = (batch.targets_BS[:, index_S] >= 0).flatten().to(device)
        window_B = torch.tensor(batch.sample_ids)
        kept_BS = ((window_B >= 0) & (window_B < self.windows))[:, None] & (index_S % self.stride == 0)
        keys_BS = (source * self.windows + window_B[:, None]) * self.seq_len + index_S
        self.keys_T = keys_BS.flatten().where(kept_BS.flatten() & self.valid_T.cpu(), -1)
        self.token_T = batch.tokens_BS[:, index_S].flatten()

    def _see(self, layer: int, probs_TE: Tensor, ids_TK: Tensor) -> None:
        n, E = self.layers.index(layer), probs_TE.shape[1]
        weight_T = self.valid_T.to(probs_TE.dtype)
        chosen = ids_TK[self.valid_T].flatten()
        self.counts_LGE[n, self.domain, :E] += torch.bincount(chosen, minlength=E)
        self.entropy_L[n] += (torch.special.entr(probs_TE).sum(1) * weight_T).sum().to(self.entropy_L.dtype)
        self.tokens_L[n] += self.valid_T.sum()
        places = (self.keys_T >= 0).nonzero()[:, 0]
        if len(places):
            ids = ids_TK[places.to(ids_TK.device)].to("cpu", torch.int16).numpy()
            keys, tokens = self.keys_T[places].tolist(), self.token_T[places].tolist()
            self.sample[layer].update(zip(keys, zip(tokens, ids, strict=True), strict=True))

    def collect(self, step: int, run_dir: Path) -> dict[str, Any]:
        """The metrics of the evaluation after ``step`` steps; writes ``routing/step-N.npz``. Collective. A full disk
        costs a warning."""
        if not self.layers:
            return {}
        for total in (self.counts_LGE, self.entropy_L, self.tokens_L):
            dist.all_reduce(total)
        merged: dict[int, dict[int, tuple[int, np.ndarray]]] = {i: {} for i in self.layers}
        packed = {}  # some large arrays, not a small one for each token and layer
        for layer, rows in self.sample.items():
            if rows:
                tokens, ids = zip(*rows.values(), strict=True)
                packed[layer] = np.array(list(rows)), np.array(tokens), np.stack(ids)
        for part in Ranks().gather_first(packed):
            for layer, (keys_N, token_N, ids_NK) in part.items():
                merged[layer].update(zip(keys_N.tolist(), zip(token_N.tolist(), ids_NK, strict=True), strict=True))
        counts_LGE = self.counts_LGE.cpu().numpy()

        def write() -> None:
            try:
                save(run_dir / "routing" / f"step-{step}.npz", self.layers, self.data.domains, counts_LGE, merged)
            except OSError as error:
                log.warning("routing/step-%d.npz was not written: %s", step, error.strerror)

        Ranks().first(write)
        mean_L = (self.entropy_L / self.tokens_L.clamp(min=1)).tolist()
        by_layer = [h / math.log(E) if E > 1 else 0.0 for h, E in zip(mean_L, self.experts, strict=True)]
        return {"router_entropy": sum(by_layer) / len(by_layer), "router_entropy_by_layer": by_layer}


def save(
    file: Path,
    layers: list[int],
    domains: list[str],
    counts_LGE: np.ndarray,
    sample: dict[int, dict[int, tuple[int, np.ndarray]]],
) -> None:
    """Write one evaluation's routing, whole or not at all; docs/run-directory.md says what is in it. sample: of each
    layer the token and the experts at each place."""
    keys = sorted(set.intersection(*(set(rows) for rows in sample.values())))
    K = max((len(rows[keys[0]][1]) for rows in sample.values()), default=0) if keys else 0
    ids_LTK = np.full((len(layers), len(keys), K), -1, dtype=np.int16)
    for n, layer in enumerate(layers):
        for t, key in enumerate(keys):
            ids = sample[layer][key][1]
            ids_LTK[n, t, : len(ids)] = ids
    token_T = np.array([sample[layers[0]][key][0] for key in keys], dtype=np.int32)
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as out:
        np.savez_compressed(
            out, counts_LGE=counts_LGE, ids_LTK=ids_LTK, layers=np.array(layers), domains=np.array(domains),
            token_T=token_T,
        )  # fmt: skip
    temporary.replace(file)
