"""Ctrl-C, and the SIGTERM that Slurm or a spot machine sends: save first, then end.

The first signal sets an event, which training looks at between its steps; the second ends at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, with exit status 143."""


@contextlib.contextmanager
def stops_gently(stop: threading.Event, *, quiet: bool = False) -> Iterator[None]:
    """Inside the context SIGINT and SIGTERM set `stop`; a second one raises KeyboardInterrupt.

    What raises KeyboardInterrupt because `stop` is set leaves as `Terminated` after SIGTERM.

    Args:
        stop: looked at by what is running.
        quiet: for a worker: prints nothing, and further signals do not interrupt what it saves.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may receive signals
        return
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if stop.is_set():
            if quiet:
                return  # a terminal's Ctrl-C has reached runner and worker; the runner's own comes next
            raise KeyboardInterrupt
        stop.set()
        if not quiet:  # not print: a signal may come in the middle of one
            os.write(2, b"\nsaving the trials in flight; once more to end at once\n")

    before = {number: signal.signal(number, receive) for number in _SIGNALS}
    try:
        yield
    except KeyboardInterrupt as error:
        if received[:1] == [signal.SIGTERM] and not isinstance(error, Terminated):
            raise Terminated from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
