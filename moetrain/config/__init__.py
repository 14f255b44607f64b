"""What a run is: the schema of its config, how it is loaded, checked and kept."""

from moetrain.config.files import load, read, save
from moetrain.config.schema import Config
from moetrain.config.typed import to_dict

__all__ = ["Config", "load", "read", "save", "to_dict"]
