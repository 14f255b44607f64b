"""moetrain: pretrain mixture-of-experts language models under any parallel mapping, with the same loss."""

__version__ = "0.1.0"
