"""Collectives with autograd, groups as arguments."""

from moetrain.comm.collectives import (
    Group,
    all_gather_ints,
    all_gather_v,
    all_to_all,
    reduce_scatter_v,
    start_all_to_all,
    start_reduce_scatter_v,
)
from moetrain.comm.pending import Flight, Pending, done, start

__all__ = [
    "Flight",
    "Group",
    "Pending",
    "all_gather_ints",
    "all_gather_v",
    "all_to_all",
    "done",
    "reduce_scatter_v",
    "start",
    "start_all_to_all",
    "start_reduce_scatter_v",
]
