"""Each rank's state in shared memory of its node, and a copy on another node, so that a lost rank costs few steps.

Every so many steps a rank copies its tensors into a slot (see ``slots``); a thread then takes the checksum and brings a
copy to the neighbour, over the group, or through memory where both are on one node. When ranks start again, they agree
on the newest step of which every rank's state is whole somewhere, and each gets its own. Which rank is on which node
may have changed; the mapping and the world size may not, or the newest checkpoint is taken.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.slots import DATA, SHARED, Folder, Header, Slot, checksum, node_of
from moetrain.checkpoint.state import decode, encode
from moetrain.comm.ranks import Ranks, lost_connection, one_line

PIECE = 2**28  # bytes sent at a time
LEAVE_S = 10.0


@dataclass(frozen=True)
class Found:
    """A snapshot that can be loaded: where each rank's state is. step: optimizer steps done. base: of the newest
    checkpoint when it was taken. source: (file, rank that gives it) by owner."""

    step: int
    base: int
    source: list[tuple[str, int]]


class Snapshots:
    """Snapshots of one run. Collective, as are all methods but ``wait`` and ``close``.

    key: of the run. mapping: sizes that must be the same to load one. root: shared memory.
    """

    def __init__(self, key: str, mapping: Mapping[str, Any], root: Path = SHARED, timeout_s: float = 1800) -> None:
        self.folder = Folder(key, root)
        self.off = ""  # why there are none any more
        own = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if dist.is_initialized() else None
        self._ranks = ranks = Ranks(own)
        about = {**mapping, "world": ranks.size}
        self._mapping = zlib.crc32(json.dumps(about, sort_keys=True).encode())
        self._nodes: list[str] = ranks.gather(node_of(root))
        self._cleans = self._nodes.index(self._nodes[ranks.rank]) == ranks.rank  # one rank of each node
        keepers = neighbours(self._nodes)
        self._to, self._of = keepers[ranks.rank], keepers.index(ranks.rank)
        self._slots: dict[str, Slot] = {}
        self._thread: threading.Thread | None = None
        self._tidied = False

    def take(self, step: int, tensors: Mapping[str, Tensor], train: Any, base: int) -> None:
        """Keep ``tensors`` (this rank's) and ``train`` (plain data) as of ``step``.

        Returns when they are copied; waits for the snapshot before. Without the memory for it there are none from then
        on, on any rank: one line in the log says so.
        """
        self.wait()
        if self.off:
            return
        slot: Slot | Exception
        header = Header(step, self._ranks.rank, base, self._mapping, 0, 0, 0)
        try:
            slot, header = self._put(header, tensors, train)
        except OSError as error:  # the others must hear of it, in the thread
            slot = error
        self._thread = threading.Thread(target=self._finish, args=(slot, header), daemon=True, name="snapshot")
        self._thread.start()

    def wait(self) -> None:
        """Return when no snapshot is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def find(self) -> Found | None:
        """The newest whole snapshot, its checksums verified; None without one. Damaged files are named in the log."""
        ranks, held = self._ranks, {}
        for name in self.folder.files():
            header = self._slot(name).header()
            if header is not None and header.mapping == self._mapping:
                held[name] = header
        places = [
            (file, rank, header) for rank, files in enumerate(ranks.gather(held)) for file, header in files.items()
        ]
        bad: set[tuple[str, str]] = set()
        while True:
            good = [place for place in places if (self._nodes[place[1]], place[0]) not in bad]
            found = self._newest(good)
            if found is None:
                return None
            mine = [file for file, giver in found.source if giver == ranks.rank]
            damaged = [file for file in mine if not self._is_whole(self._slot(file))]
            told = [(file, rank) for rank, files in enumerate(ranks.gather(damaged)) for file in files]
            if not told:
                return found
            for name, giver in told:
                bad.add((self._nodes[giver], name))
                where = self.folder.path / name
                ranks.say(logging.WARNING, f"snapshot of step {found.step}: {where} of rank {giver}'s node is damaged")

    def load(self, found: Found, tensors: Mapping[str, Tensor]) -> Any:
        """Put this rank's state of ``found`` into ``tensors``; the first rank's ``train``, on all. Raises ValueError
        when it is of other tensors; then none is changed."""
        ranks = self._ranks
        mine = self._bring(found)
        header = mine.header()
        assert header is not None
        about = decode(mine.about(header.size, header.about).numpy().tobytes())
        targets = {name: local(value) for name, value in tensors.items()}
        spec = {name: (list(t.shape), str(t.dtype)) for name, t in targets.items()}
        saved = {name: (shape, dtype) for name, shape, dtype in about["tensors"]}

        def refuse() -> None:
            # A parameter that never had a gradient has no optimizer state; zero, as it is here, is its state.
            lacks = [name for name in spec if name not in saved and not name.startswith("optim.")]
            other = [name for name in saved if spec.get(name) != saved[name]]
            if lacks or other:
                raise ValueError(f"it is of another model or optimizer: {(lacks + other)[0]}")

        ranks.each(refuse)
        for name, view in _views(mine, saved).items():
            targets[name].copy_(view)
        return ranks.first(lambda: about["train"])

    def keep_only(self, found: Found | None) -> None:
        """Forget all snapshots but ``found``: what was not whole must not be mistaken for it later."""

        def clear() -> None:
            self._slots.clear()
            for name in self.folder.files() if self._cleans else ():
                header = Slot(self.folder.path / name).header()
                if found is None or header is None or header.step != found.step:
                    (self.folder.path / name).unlink(missing_ok=True)

        self._ranks.each(clear)

    def close(self, remove: bool) -> None:
        """End. remove: the run needs them no more."""
        if self._thread is not None:
            self._thread.join(LEAVE_S)  # not for ever, since a rank may be gone
        self._slots.clear()
        self.folder.leave(remove)

    # Taking one

    def _put(self, header: Header, tensors: Mapping[str, Tensor], train: Any) -> tuple[Slot, Header]:
        """Copy into the older of the own slots; not sealed yet."""
        locals_ = {name: local(value) for name, value in tensors.items()}
        spec = [(name, list(t.shape), str(t.dtype)) for name, t in locals_.items()]
        about = encode({"tensors": spec, "train": train})
        header = replace(header, size=sum(_padded(t) for t in locals_.values()), about=len(about))
        slot = self._older("own", header)
        targets = _views(slot, {name: (shape, dtype) for name, shape, dtype in spec})
        torch._foreach_copy_([targets[name] for name in locals_], list(locals_.values()))
        slot.about(header.size, header.about).copy_(torch.frombuffer(bytearray(about), dtype=torch.uint8))
        return slot, header

    def _older(self, kind: str, header: Header) -> Slot:
        """The one of both slots whose step is older, with room and without a header."""
        self.folder.hold()
        both = [self._slot(f"{kind}-{header.owner}-{i}") for i in (0, 1)]
        steps = [-1 if found is None else found.step for found in (slot.header() for slot in both)]
        slot = both[steps.index(min(steps))]
        slot.reserve(header.size, header.about)
        slot.invalidate()
        return slot

    def _finish(self, slot: Slot | Exception, header: Header) -> None:
        """The thread: seal the own slot, exchange copies, and end together with all ranks."""
        ranks = self._ranks
        try:
            if isinstance(slot, Slot):
                header = replace(header, checksum=checksum(slot.payload(header)))
                slot.seal(header)
                self.folder.touch()
            answers = ranks.gather((header, slot.path.name) if isinstance(slot, Slot) else one_line(slot))
            if not self._refused(answers) and ranks.size > 1:
                assert isinstance(slot, Slot)
                self._exchange(slot, header, *answers[self._of])
            if not self._tidied:
                self._tidied = True
                self._tidy()
        except Exception as error:
            self.off = one_line(error)
            if not lost_connection(error):  # of a rank that is gone, training will hear
                ranks.say(logging.WARNING, f"snapshots  none from here on: {self.off}")

    def _refused(self, answers: list[Any]) -> bool:
        problems = [answer for answer in answers if isinstance(answer, str)]
        if problems:
            self.off = problems[0]
            self._ranks.say(logging.WARNING, f"snapshots  none from here on: {self.off}")
        return bool(problems)

    def _exchange(self, slot: Slot, header: Header, theirs: Header, file: str) -> None:
        """Send the own state to its keeper, and keep the neighbour's. Returns when all ranks have theirs."""
        ranks, keep = self._ranks, None
        problem = ""
        try:
            keep = self._older("copy", theirs)
        except OSError as error:
            problem = one_line(error)
        if self._refused([problem or None for problem in ranks.gather(problem)]):
            return
        assert keep is not None
        sends: list[Any] = []
        if self._nodes[self._to] != self._nodes[ranks.rank]:
            sends = [dist.isend(part, group=ranks.group, group_dst=self._to) for part in _pieces(slot.payload(header))]
        if self._nodes[self._of] == self._nodes[ranks.rank]:
            source = self._slot(file)
            if len(source.payload(theirs)) < len(keep.payload(theirs)):
                source = self._slots[file] = Slot(source.path)  # it has grown
            np.copyto(keep.payload(theirs).numpy(), source.payload(theirs).numpy())
        else:
            for part in _pieces(keep.payload(theirs)):
                dist.recv(part, group=ranks.group, group_src=self._of)
        for send in sends:
            send.wait()
        keep.seal(theirs)
        ranks.gather(None)  # nobody begins the next one before this one is whole everywhere

    def _tidy(self) -> None:
        """Ranks may have moved to other nodes: remove what no rank of this node writes any more."""
        here = [rank for rank, node in enumerate(self._nodes) if node == self._nodes[self._ranks.rank]]
        keepers = neighbours(self._nodes)
        owners = {"own": set(here), "copy": {owner for owner, keeper in enumerate(keepers) if keeper in here}}
        for name in self.folder.files() if self._cleans else ():
            kind, owner, _ = name.split("-")
            if int(owner) not in owners[kind]:
                (self.folder.path / name).unlink(missing_ok=True)

    # Finding and loading one

    def _newest(self, places: list[tuple[str, int, Header]]) -> Found | None:
        """places: (file, rank that sees it, header)."""
        for step in sorted({header.step for *_, header in places}, reverse=True):
            source: list[tuple[str, int]] = []
            bases = set()
            for owner in range(self._ranks.size):
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

    def _bring(self, found: Found) -> Slot:
        """This rank's state: a slot of its node, or what another rank sends."""
        ranks, mine = self._ranks, None
        for owner, (file, giver) in enumerate(found.source):
            if owner == ranks.rank and giver == ranks.rank:
                mine = self._slot(file)
            elif giver == ranks.rank:
                slot = self._slot(file)
                header = slot.header()
                assert header is not None
                dist.send(torch.tensor([header.size, header.about]), group=ranks.group, group_dst=owner)
                for part in _pieces(slot.bytes_N[: DATA + len(slot.payload(header))]):
                    dist.send(part, group=ranks.group, group_dst=owner)
            elif owner == ranks.rank:
                sizes = torch.zeros(2, dtype=torch.int64)
                dist.recv(sizes, group=ranks.group, group_src=giver)
                size, about = sizes.tolist()
                mine = Slot(Path(os.devnull))
                mine.bytes_N = torch.empty(DATA + -(-size // DATA) * DATA + about, dtype=torch.uint8)
                for part in _pieces(mine.bytes_N):
                    dist.recv(part, group=ranks.group, group_src=giver)
        assert mine is not None
        return mine

    def _is_whole(self, slot: Slot) -> bool:
        with suppress(OSError):
            header = slot.header()
            return header is not None and checksum(slot.payload(header)) == header.checksum
        return False

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            self._slots[name] = Slot(self.folder.path / name)
        return self._slots[name]


def neighbours(nodes: list[str]) -> list[int]:
    """Of each rank the one that keeps its copy, each of one: on another node unless half of all ranks share the node.

    In the order of nodes, a step as long as the largest node has ranks leads out of every node.
    """
    order = sorted(range(len(nodes)), key=lambda rank: (nodes.index(nodes[rank]), rank))
    largest = max(nodes.count(node) for node in nodes)
    step = largest if 2 * largest <= len(nodes) else max(1, len(nodes) // 2)
    keeper = {rank: order[(i + step) % len(order)] for i, rank in enumerate(order)}
    return [keeper[rank] for rank in range(len(nodes))]


def local(value: Tensor) -> Tensor:
    """This rank's part."""
    value = value.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that a slot of them takes, description aside."""
    return sum(_padded(local(value)) for value in tensors.values())


def _padded(value: Tensor) -> int:
    return -(-value.numel() * value.element_size() // DATA) * DATA


def _views(slot: Slot, spec: Mapping[str, tuple[list[int], str]]) -> dict[str, Tensor]:
    """The tensors in a slot, in order."""
    views, at = {}, DATA
    for name, (shape, dtype) in spec.items():
        kind: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
        empty = torch.empty(shape, dtype=kind, device="meta")
        end = at + empty.numel() * empty.element_size()
        views[name] = slot.bytes_N[at:end].view(kind).view(shape)
        at += _padded(empty)
    return views


def _pieces(bytes_N: Tensor) -> tuple[Tensor, ...]:
    return bytes_N.split(PIECE)
