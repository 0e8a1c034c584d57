"""A process that trains trials for `sweeps.run`: one per GPU, or one on a CPU.

It knows nothing of the study. It asks for jobs, says what becomes of them, and shows its progress, all
through one pipe (`sweeps.pool` is at the other end). When the pipe closes, because its runner was killed,
it saves its trials and ends.

    python -m sweeps.worker FILE_DESCRIPTOR
"""

import pickle
import sys
import threading
import traceback
from io import TextIOBase
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console

from training.interrupts import stops_gently
from training.job import Job, JobOptions, Outcome, Trials
from training.progress import Display


def main(descriptor: int) -> None:
    link = _Link(Connection(descriptor))
    engine, settings = link.connection.recv()
    sys.stdout = _Lines(link)
    options = JobOptions(**settings, display=_RemoteDisplay(link), stop=link.stop)
    try:
        with stops_gently(link.stop, quiet=True):
            from training.run import run_jobs  # torch and transformers take seconds to import

            run_jobs(_RemoteTrials(link), engine=engine, options=options)
        sys.exit(1 if link.stop.is_set() else 0)
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the runner raises it again
        link.send("fault", _sendable(error), traceback.format_exc())
        sys.exit(1)


class _Link:
    """The worker's end of the pipe; once it is broken, `stop` is set and nothing is sent any more."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.stop = threading.Event()

    def send(self, *message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            self.stop.set()

    def ask(self, name: str, *args: Any) -> Any:
        """The runner's answer; None where there is none to be had any more."""
        self.send("ask", name, args)
        try:
            while not self.stop.is_set():
                if self.connection.poll(0.2):
                    return self.connection.recv()
        except (OSError, EOFError):
            self.stop.set()
        return None


class _RemoteTrials(Trials):
    """The runner's queue."""

    def __init__(self, link: _Link):
        self.link = link

    def next_job(self) -> Job | None:
        return self.link.ask("next_job")

    def began(self, job: Job, step: int) -> str | None:
        return self.link.ask("began", job.number, step)

    def evaluated(self, job: Job, step: int, loss: float) -> str | None:
        return self.link.ask("evaluated", job.number, step, loss)

    def leads(self, job: Job, step: int, loss: float) -> bool:
        return bool(self.link.ask("leads", job.number, step, loss))

    def stored(self, job: Job, step: int) -> None:
        self.link.ask("stored", job.number, step)

    def done(self, job: Job, outcome: Outcome) -> None:
        is_fault = isinstance(outcome, Exception)
        self.link.ask("done", job.number, _sendable(outcome) if is_fault else outcome)


class _RemoteDisplay(Display):
    """Shows on the runner's terminal what happens here."""

    def __init__(self, link: _Link):
        lines: Any = _Lines(link)
        super().__init__(Console(file=lines, soft_wrap=True, highlight=False, markup=False))
        self.link, self.number = link, 0

    def __enter__(self) -> "_RemoteDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add(self, label: str, num_steps: int) -> Any:
        self.number += 1
        self.link.send("add", self.number, label, num_steps)
        return _RemoteProgress(self.link, self.number)


class _RemoteProgress:
    """`training.progress.Progress`, seen from here."""

    def __init__(self, link: _Link, number: int):
        self.link, self.number = link, number

    def resumed(self, step: int, train_loss: float) -> None:
        self.link.send("show", self.number, "resumed", (step, train_loss), {})

    def step(self, step: int, train_loss: float) -> None:
        self.link.send("show", self.number, "step", (step, train_loss), {})

    def evaluated(self, step: int, eval_loss: float, *, is_best: bool) -> None:
        self.link.send("show", self.number, "evaluated", (step, eval_loss), {"is_best": is_best})

    def close(self) -> None:
        self.link.send("show", self.number, "close", (), {})


class _Lines(TextIOBase):
    """Standard output: whole lines go to the runner, whose table they would break otherwise."""

    def __init__(self, link: _Link):
        self.link, self.rest = link, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.link.send("print", line)
        return len(text)

    def writable(self) -> bool:
        return True


def _sendable(error: Any) -> Exception:
    """The exception, or its text where it cannot be pickled and made again."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an exception's own constructor does
        return RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
