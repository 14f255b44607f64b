"""Agreement among ranks: what fails on one fails on all, at the same point, so that nobody waits for ever."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config.errors import UserError

log = logging.getLogger("moetrain")

T = TypeVar("T")


class RankError(UserError):
    """Something unforeseen failed on a rank; raised on all. The text is one line, of the lowest of these ranks."""

    exit_code = 1


class Ranks:
    """The ranks that take part, or this process alone when ``group`` is None and there is no default group.

    group: its backend must carry CPU tensors (gloo).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.alone = not dist.is_initialized()
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is their rank 0."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value`` (it must pickle), in rank order, on every rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_first(self, value: T) -> list[T]:
        """``gather`` to rank 0 alone, for what is large; an empty list on the other ranks."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, values or None, group=self.group, group_dst=0)
        return values

    def each(self, work: Callable[[], T]) -> list[T]:
        """``work()`` on every rank; all results. What it raised on any rank is raised on all: a UserError as it is, all
        else as a RankError."""
        return self._agree(work, name_rank=self.size > 1)

    def first(self, work: Callable[[], T]) -> T:
        """``work()`` on rank 0 alone; its result on every rank. What it raised is raised on all, as in ``each``."""
        return self._agree(lambda: work() if self.rank == 0 else None, name_rank=False)[0]  # type: ignore[return-value]

    def first_for_long(self, work: Callable[[], T], every_s: float = 2.0) -> T:
        """``first`` for work that may take longer than a collective waits: rank 0 does it in a thread, and all ranks
        meet every ``every_s`` seconds until it is done."""
        if self.size == 1:
            return self.first(work)
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        if self.rank == 0:
            threading.Thread(target=run, daemon=True).start()
        while not self.gather(self.rank > 0 or bool(wait([done], every_s).done))[0]:
            pass
        return self.first(done.result)

    def _agree(self, work: Callable[[], T], name_rank: bool) -> list[T]:
        try:
            mine: tuple[Any, Exception | None] = (work(), None)
        except UserError as error:
            mine = (None, error)
        except Exception as error:
            mine = (None, RankError(f"rank {self.rank}: {one_line(error)}" if name_rank else one_line(error)))
        answers = self.gather(mine)
        for _, failure in answers:
            if failure is not None:
                raise failure
        return [answer for answer, _ in answers]

    def bring(self, value: Tensor | None, source: int) -> Tensor:
        """The CPU tensor that rank ``source`` gives, there and on rank 0; an empty one on the other ranks."""
        if value is not None and (self.rank == 0 or source == 0):
            return value
        if value is not None:
            dist.send_object_list([(value.shape, value.dtype)], group=self.group, group_dst=0)
            dist.send(value.contiguous(), group=self.group, group_dst=0)
            return value
        if self.rank != 0:
            return torch.empty(0)
        about: list[Any] = [None]
        dist.recv_object_list(about, group=self.group, group_src=source)
        shape, dtype = about[0]
        received = torch.empty(shape, dtype=dtype)
        dist.recv(received, group=self.group, group_src=source)
        return received

    def say(self, level: int, text: str) -> None:
        """Log, once, what all ranks know alike."""
        log.log(level if self.rank == 0 else logging.DEBUG, text)


def one_line(error: BaseException) -> str:
    """What ``error`` says, on one line; its class where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__


_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)


def lost_connection(error: BaseException) -> bool:
    """Whether ``error`` looks like a collective that failed because another rank is gone or does not answer."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError) or (_LOST.search(str(seen)) and not isinstance(seen, OSError)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
