"""Each rank's state in shared memory of its node, and a copy on another node, so that a lost rank costs few steps.

Every so many steps a rank copies its tensors into a slot (see ``slots``); a thread then takes the checksum and brings a
copy to the neighbour, over the group, or through memory where both are on one node. When ranks start again, they agree
on the newest step of which every rank's state is whole somewhere, and each gets its own. Which rank is on which node
may have changed; the mapping and the world size may not, or the newest checkpoint is taken.
"""

from __future__ import annotations

import json
import logging
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.slots import DATA, SHARED, Folder, Header, Slot, checksum, node_of
from moetrain.checkpoint.snapshot_find import Found, bring, find, pieces
from moetrain.checkpoint.state import decode, encode
from moetrain.comm.ranks import Ranks, one_line

LEAVE_S = 60.0  # for the snapshot under way at a run's end


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
        self._ready: Slot | None = None
        self._tidied = False

    def take(self, step: int, tensors: Mapping[str, Tensor], train: Any, base: int) -> None:
        """Keep ``tensors`` (this rank's) and ``train`` (plain data) as of ``step``.

        Returns when they are copied; waits for the snapshot before. Without the memory for it there are none from then
        on, on any rank: one line in the log says so.
        """
        self.wait()
        if self.off:
            return
        slot: Slot | OSError
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
        headers = {name: self._slot(name).header() for name in self.folder.files()}
        held = {name: header for name, header in headers.items() if header and header.mapping == self._mapping}
        return find(self._ranks, self._nodes, self.folder.path, held, self._slot)

    def load(self, found: Found, tensors_for: Callable[[Any], Mapping[str, Tensor]]) -> Any:
        """Put this rank's state of ``found`` into the tensors for the first rank's ``train``, which is returned on all.
        Raises RankError when it is of other tensors on any rank; then none is changed."""
        ranks = self._ranks
        mine = bring(ranks, found, self._slot)
        header = mine.header()
        assert header is not None
        about = decode(mine.about(header.size, header.about).numpy().tobytes())
        train = ranks.first(lambda: about["train"])
        targets = {name: local(value) for name, value in tensors_for(train).items()}
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
        return train

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
        on_gpu = any(t.is_cuda for t in locals_.values())
        if on_gpu:
            slot.lock()
        torch._foreach_copy_([targets[name] for name in locals_], list(locals_.values()), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
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

    def _finish(self, slot: Slot | OSError, header: Header) -> None:
        """The thread: seal the own slot, exchange copies, and end together with all ranks: nobody begins the next one
        before this one is whole everywhere. What fails on one rank is told to all."""
        try:
            answers = self._ranks.gather(_tell(lambda: self._seal(slot, header)))
            if self._refused(answers) or self._ranks.size == 1:
                return
            mine, theirs = answers[self._ranks.rank], answers[self._of]
            if self._refused(self._ranks.gather(_tell(lambda: self._make_ready(theirs[1])))):
                return
            sends = self._send(*mine)
            if self._refused(self._ranks.gather(_tell(lambda: self._keep(*theirs)))):
                return
            for send in sends:
                send.wait()
            if not self._tidied:
                self._tidied = True
                with suppress(OSError):
                    self._tidy()
        except Exception as error:  # a rank is gone, of which training will hear
            self.off = one_line(error)

    def _seal(self, slot: Slot | OSError, header: Header) -> tuple[str, Header]:
        if isinstance(slot, OSError):
            raise slot
        header = replace(header, checksum=checksum(slot.payload(header)))
        slot.seal(header)
        self.folder.touch()
        return slot.path.name, header

    def _make_ready(self, header: Header) -> None:
        self._ready = self._older("copy", header)

    def _refused(self, answers: list[Any]) -> bool:
        problems = [answer for answer in answers if isinstance(answer, str)]
        if problems:
            self.off = problems[0]
            self._ranks.say(logging.WARNING, f"snapshots  none from here on: {self.off}")
        return bool(problems)

    def _send(self, file: str, header: Header) -> list[Any]:
        """Begin to send the own state to its keeper, if that is on another node."""
        if self._nodes[self._to] == self._nodes[self._ranks.rank]:
            return []
        parts = pieces(self._slot(file).payload(header))
        return [dist.isend(part, group=self._ranks.group, group_dst=self._to) for part in parts]

    def _keep(self, file: str, header: Header) -> None:
        """Fill the slot that was made ready for the neighbour's state, which is in ``file`` on its node."""
        keep = self._ready
        assert keep is not None
        if self._nodes[self._of] == self._nodes[self._ranks.rank]:
            source = self._slot(file)
            if len(source.payload(header)) < len(keep.payload(header)):
                source = self._slots[file] = Slot(source.path)  # it has grown
            np.copyto(keep.payload(header).numpy(), source.payload(header).numpy())
        else:
            for part in pieces(keep.payload(header)):
                dist.recv(part, group=self._ranks.group, group_src=self._of)
        keep.seal(header)

    def _tidy(self) -> None:
        """Ranks may have moved to other nodes: remove what no rank of this node writes any more."""
        here = [rank for rank, node in enumerate(self._nodes) if node == self._nodes[self._ranks.rank]]
        keepers = neighbours(self._nodes)
        owners = {"own": set(here), "copy": {owner for owner, keeper in enumerate(keepers) if keeper in here}}
        for name in self.folder.files() if self._cleans else ():
            kind, owner, _ = name.split("-")
            if int(owner) not in owners[kind]:
                (self.folder.path / name).unlink(missing_ok=True)

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            self._slots[name] = Slot(self.folder.path / name)
        return self._slots[name]


def _tell(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or what kept it from that, as a line."""
    try:
        return work()
    except Exception as error:
        return one_line(error)


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
