"""What can be refused before a rank starts: data that does not fit the model, an export that no class could hold."""

from __future__ import annotations

from moetrain.config.schema import Config
from moetrain.convert.family import family_of
from moetrain.data.dataset import TokenData
from moetrain.data.sampler import Sampler


def preflight(cfg: Config) -> None:
    """Check prepared data and export of ``cfg``. Raises DataError or ConvertError for what could not work later."""
    open_sampler(cfg, TokenData.open(cfg.data.dir, vocab_size=cfg.model.vocab_size))
    if cfg.export.at_end:
        family_of(cfg.model)


def open_sampler(cfg: Config, data: TokenData) -> Sampler:
    """The run's sampler over ``data``, with the weights of the config."""
    weights = {name: source.weight for name, source in cfg.data.sources.items()}
    return Sampler(data, cfg.seed, weights, cfg.train.seq_len)
