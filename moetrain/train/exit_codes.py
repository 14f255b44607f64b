"""Exit codes of a run, for whoever starts it again. 0: it is done; 1: it ended; 2: its input cannot run."""

REQUEUE = 85  # stopped by a signal, state saved: the same command goes on
LOST = 86  # a rank died or hung: the same command goes on from the newest whole checkpoint
