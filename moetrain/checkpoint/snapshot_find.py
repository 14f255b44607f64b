"""Which snapshot ranks can go on from when they start again, and bringing each its state of it; see ``snapshot``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.slots import DATA, Header, Slot, checksum
from moetrain.comm.ranks import Ranks

PIECE = 2**28  # bytes sent at a time


@dataclass(frozen=True)
class Found:
    """A snapshot that can be loaded: where each rank's state is. step: optimizer steps done. base: of the newest
    checkpoint when it was taken. source: (file, rank that gives it) by owner."""

    step: int
    base: int
    source: list[tuple[str, int]]


def find(
    ranks: Ranks, nodes: list[str], folder: Path, held: Mapping[str, Header], slot_of: Callable[[str], Slot]
) -> Found | None:
    """The newest step of which every rank's state is whole somewhere. Collective.

    nodes: of each rank. held: the headers of the files in ``folder`` on this rank's node. slot_of: a file by name.
    """
    seen = enumerate(ranks.gather(dict(held)))
    places = [(file, rank, header) for rank, files in seen for file, header in files.items()]
    bad: set[tuple[str, str]] = set()
    while True:
        found = newest([place for place in places if (nodes[place[1]], place[0]) not in bad], ranks.size)
        if found is None:
            return None
        mine = [file for file, giver in found.source if giver == ranks.rank]
        damaged = [file for file in mine if not is_whole(slot_of(file))]
        told = [(file, rank) for rank, files in enumerate(ranks.gather(damaged)) for file in files]
        if not told:
            return found
        for name, giver in told:
            bad.add((nodes[giver], name))
            where = f"{folder / name} of rank {giver}'s node"
            ranks.say(logging.WARNING, f"snapshot of step {found.step}: {where} is damaged")


def newest(places: list[tuple[str, int, Header]], world: int) -> Found | None:
    """The newest step that is there of every rank. places: (file, rank that sees it, header)."""
    for step in sorted({header.step for *_, header in places}, reverse=True):
        source: list[tuple[str, int]] = []
        bases = set()
        for owner in range(world):
            held = [(file, rank, h) for file, rank, h in places if h.step == step and h.owner == owner]
            if not held:
                break
            # Its own rank's node first, there the rank's own file; else the first that has it
            file, rank, header = min(held, key=lambda place: (place[1] != owner, place[0][:3] != "own", place[1]))
            source.append((file, rank))
            bases.add(header.base)
        else:
            return Found(step, min(bases), source)
    return None


def bring(ranks: Ranks, found: Found, slot_of: Callable[[str], Slot]) -> Slot:
    """This rank's state of ``found``: a file of its node, or what another rank sends. Collective."""
    mine = None
    for owner, (file, giver) in enumerate(found.source):
        if giver == ranks.rank:
            slot = slot_of(file)
            header = slot.header()
            assert header is not None
            if owner == giver:
                mine = slot
                continue
            bytes_N = slot.bytes_N[: DATA + len(slot.payload(header))]
            dist.send(torch.tensor([len(bytes_N)]), group=ranks.group, group_dst=owner)
            for part in pieces(bytes_N):
                dist.send(part, group=ranks.group, group_dst=owner)
        elif owner == ranks.rank:
            size = torch.zeros(1, dtype=torch.int64)
            dist.recv(size, group=ranks.group, group_src=giver)
            mine = Slot(Path(os.devnull))
            mine.bytes_N = torch.empty(int(size), dtype=torch.uint8)
            for part in pieces(mine.bytes_N):
                dist.recv(part, group=ranks.group, group_src=giver)
    assert mine is not None
    return mine


def is_whole(slot: Slot) -> bool:
    """Whether a slot has what its header says."""
    header = slot.header()
    return header is not None and checksum(slot.payload(header)) == header.checksum


def pieces(bytes_N: Tensor) -> tuple[Tensor, ...]:
    """``bytes_N`` in parts that are sent one by one."""
    return bytes_N.split(PIECE)
