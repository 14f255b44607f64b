"""Collectives with autograd, groups as arguments."""

from moetrain.comm.collectives import all_gather_ints, all_gather_v, all_to_all, reduce_scatter_v

__all__ = ["all_gather_ints", "all_gather_v", "all_to_all", "reduce_scatter_v"]
