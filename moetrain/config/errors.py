"""Errors that a user can act on. Their text is one line: what is wrong, where, and what to do. The command line prints
it without a traceback and exits with the class's exit code."""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """Base of all errors that are shown as one line. Exit code 2: nothing has run; 1: a run ended."""

    exit_code: ClassVar[int] = 2


class ConfigError(UserError, ValueError):
    """A config that cannot run."""


class DataError(UserError):
    """Text, shards or a tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class ConvertError(UserError):
    """A model that cannot be imported or exported, or a tensor that no rule covers."""


class TrainError(UserError):
    """A run that must stop: a non-finite loss, a lost rank."""

    exit_code: ClassVar[int] = 1
