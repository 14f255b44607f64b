"""Placement of experts, made real: copies for each step, homes that change with their optimizer state along.

The plan of a step follows from the loads of finished steps, which all ranks know alike, and so do all ranks' plans.
Where a rank owns other experts than plain expert parallelism gives it, the local part of a parameter (a DTensor that
says Shard(0)) holds these, ascending, however many they are; all that looks at global rows goes through ``as_ep``.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.comm.sparse import Atoms, sparse_all_gather
from moetrain.config.advice import enforce
from moetrain.config.check_placement import placement, placement_kind
from moetrain.config.schema import Config
from moetrain.moe.balance import Loads
from moetrain.moe.dispatch.placed import PlacedDispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.placement import build_policy
from moetrain.moe.placement.copies import Copies
from moetrain.moe.placement.plan import WINDOW, Homes, Placement, at_home, ep_homes, predict
from moetrain.parallel.mesh import ParallelDims

log = logging.getLogger("moetrain")


def build_placement(cfg: Config, model: nn.Module, dims: ParallelDims) -> ExpertPlacement | None:
    """What moves experts of ``model`` between ranks; None where none ever moves. Raises ConfigError where the mapping
    does not allow ``cfg.experts.placement``."""
    enforce([placement], cfg, dims.sizes)
    kind = placement_kind(cfg)
    if kind != "ep" and dims.sizes.ep == 1:
        log.warning("experts    one rank has all: experts.placement.kind=%s has nothing to place", kind)
    return None if kind == "ep" or dims.sizes.ep == 1 else ExpertPlacement(cfg, model, dims)


class ExpertPlacement:
    """The experts of ``model``, which ``build_parallel`` made, under ``cfg.experts.placement``.

    history: loads of each layer in the last steps. copied: experts' weights that travel in a step of the plan in force.
    """

    def __init__(self, cfg: Config, model: nn.Module, dims: ParallelDims) -> None:
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoELayer)}
        self.group, self.ranks = dims.group("ep"), dims.sizes.ep
        self.device = next(model.parameters()).device
        self.policy = build_policy(cfg.experts.placement, self.ranks)
        self.overlap, frees, recompute = cfg.experts.overlap, self.policy.frees, cfg.train.recompute
        self.history: dict[str, list[list[int]]] = {name: [] for name in self.layers}
        self.copies: dict[str, Copies] = {}
        for name, layer in self.layers.items():
            router: Any = layer.router
            assert isinstance(layer.experts, Experts)
            copies = Copies(layer.experts, ep_homes(router.n_experts, self.ranks), dims.stage_group, frees, recompute)
            layer.experts.placed = copies.compute
            self.copies[name] = copies
        if getattr(self.policy.options, "slots", 1) == 0:
            log.warning("experts    no slots for copies (experts.placement.slots=0): plain expert parallelism")
        chain = list(self.copies.values())
        for before, after in itertools.pairwise(chain):
            before.after, after.before = after, before
        if chain:
            model.register_forward_pre_hook(lambda *_: chain[0].start())
        self.plan()

    def plan(self) -> None:
        """Place the experts for the next step."""
        for name, layer in self.layers.items():
            copies, n = self.copies[name], len(self.copies[name].homes)
            placement = self.policy.place(copies.homes, predict(self.history[name], n))
            if placement != copies.placement or not isinstance(layer.dispatcher, PlacedDispatcher):
                copies.placement = placement
                layer.dispatcher = self._dispatcher(copies, placement)
                if self.policy.calibrates:
                    layer.dispatcher.calibrate = functools.partial(self._calibrate, copies)

    def _dispatcher(self, copies: Copies, placement: Placement) -> PlacedDispatcher:
        made = PlacedDispatcher(len(copies.homes), self.group, placement, self.policy.topology)
        made.overlap = self.overlap
        return made

    def _calibrate(self, copies: Copies, counts_RE: list[list[int]]) -> PlacedDispatcher | None:
        """The dispatcher of this pass, where the real loads ask for more copies than were planned."""
        placement = self.policy.calibrate(copies.homes, copies.placement, counts_RE)
        if placement == copies.placement:
            return None
        copies.add(placement)
        return self._dispatcher(copies, placement)

    def end_step(self, step: int, loads: Loads, optimizer: torch.optim.Optimizer) -> None:
        """Learn from the last of ``step`` finished steps; move homes; plan the next step. Collective."""
        if not self.layers:
            return
        counts = [loads.counts[name] for name in self.layers]
        flat = torch.cat(counts).tolist()  # one transfer to the host
        for history, part in zip(self.history.values(), counts, strict=True):
            history.append(flat[: len(part)])
            del history[:-WINDOW], flat[: len(part)]
        now = [copies.homes for copies in self.copies.values()]
        predicted = [predict(history, len(homes)) for history, homes in zip(self.history.values(), now, strict=True)]
        homes = self.policy.rehome(step, now, predicted)
        if homes != now:
            pairs = zip(itertools.chain(*now), itertools.chain(*homes), strict=True)
            log.info("experts    %d change their home after step %d", sum(a != b for a, b in pairs), step)
            self.move(dict(zip(self.layers, homes, strict=True)), optimizer)
        self.plan()

    @torch.no_grad()
    def move(self, homes: Mapping[str, Homes], optimizer: torch.optim.Optimizer) -> None:
        """Move weights and optimizer state to ``homes`` of each layer. Collective. Tensor by tensor: all at once would
        need room for what is sent, what arrives and what comes of it, each as large as all experts with their state."""
        for name, new in homes.items():
            copies = self.copies[name]
            if new == copies.homes:
                continue
            for p in self.layers[name].experts.parameters():
                assert isinstance(p, DTensor)
                for tensor in (p, *(v for v in optimizer.state.get(p, {}).values() if isinstance(v, DTensor))):
                    tensor._local_tensor = self._moved(tensor.to_local(), copies.homes, new)
            copies.homes = new

    def as_ep(self, values: dict[str, Any], on_host: bool = False) -> dict[str, Any]:
        """``values`` of a state (their names contain a parameter's) with rows where plain expert parallelism
        has them: copies, where that is elsewhere. on_host: these copies are in host memory, since a GPU has no room for
        its experts and their optimizer state twice. Collective."""
        found = dict(values)
        for key, value in values.items():
            name = next((name for name in self.layers if f"{name}.experts." in key), None)
            if name is not None and isinstance(value, DTensor):
                homes = self.copies[name].homes
                ep = ep_homes(len(homes), self.ranks)
                if homes != ep:
                    moved = self._moved(value.to_local(), homes, ep)
                    # Not by DTensor.from_local, which takes every part to the device of its mesh
                    found[key] = DTensor(moved.cpu() if on_host else moved, value._spec, requires_grad=False)
        return found

    def to_ep(self, optimizer: torch.optim.Optimizer) -> None:
        """Move all experts to the homes of plain expert parallelism. Collective."""
        self.move({name: ep_homes(len(c.homes), self.ranks) for name, c in self.copies.items()}, optimizer)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights: equal on all ranks."""
        homes = {name: list(copies.homes) for name, copies in self.copies.items()}
        return {"ranks": self.ranks, "homes": homes, "history": {name: list(h) for name, h in self.history.items()}}

    def load_state(self, state: dict[str, Any] | None, optimizer: torch.optim.Optimizer) -> None:
        """Go on from ``state``, from homes of plain expert parallelism. Homes on other ranks are not taken over, loads
        are. Collective."""
        if state is not None and state["history"].keys() == self.history.keys():
            self.history = {name: list(h) for name, h in state["history"].items()}
            if state["ranks"] == self.ranks:
                self.move({name: tuple(homes) for name, homes in state["homes"].items()}, optimizer)
        self.plan()

    def _moved(self, x: Tensor, homes: Homes, new: Homes) -> Tensor:
        """Rows of ``x``, of experts at ``homes``, brought to ``new`` ones."""
        (moved,) = sparse_all_gather([Atoms(x.detach().to(self.device), homes, at_home(new))], self.group)
        moved = moved.to(x.device)
        return moved.pin_memory() if x.is_pinned() else moved  # optimizer state that lives in host memory
