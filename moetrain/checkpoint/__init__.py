"""Training state on disk: saved sharded and in the background, complete or absent, loaded under any mapping."""

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.load import load, newest
from moetrain.checkpoint.rng import seed_step
from moetrain.checkpoint.snapshot import Snapshots
from moetrain.checkpoint.state import apply_state, gather_state

__all__ = ["Checkpointer", "Snapshots", "apply_state", "gather_state", "load", "newest", "seed_step"]
