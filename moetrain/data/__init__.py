"""Data: text -> token shards (prepare.py), shards -> windows (dataset.py, sampler.py) -> batches of a step
(loader.py)."""
