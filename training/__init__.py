"""One process, one base model: trials in, adapters and losses out. Imports no other package."""

import logging
import sys
from types import TracebackType

# bitsandbytes says at import, 4-bit or not, that an optional kernel is missing: noise on every command.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _end_quietly(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Ctrl-C while PyTorch is being loaded, before `training.cli.run_command` sees to it, is no fault."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        _report(kind, error, traceback)


_report, sys.excepthook = sys.excepthook, _end_quietly
