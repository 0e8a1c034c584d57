"""Errors that a user can act on. Each message names the thing, its value, what it must be, and where.

Every command prints such an error as one line and exits with status 2 (`training.cli.run_command`);
any other exception is a fault of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class LoraloomError(Exception):
    """Root of the errors raised for something the user can change."""


class ConfigError(LoraloomError, ValueError):
    """A setting, an option or a sweep definition is wrong."""


class DataError(LoraloomError, ValueError):
    """A dataset or one of its records cannot be used."""


class ModelError(LoraloomError, OSError):
    """A base model, an adapter or a GGUF cannot be used."""


class SweepError(LoraloomError, RuntimeError):
    """A sweep directory, its study or its trials cannot be used."""


class GateError(LoraloomError, RuntimeError):
    """Promotion refused a model: a gate or a verification failed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'learning_rate'?"`, or an empty string where nothing known is near `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
