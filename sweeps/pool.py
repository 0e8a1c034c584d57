"""The runner's side of its worker processes: started, watched, started again when one dies.

All that a worker asks goes to one `TrialQueue` here, so that one process alone writes the study. The trials
of a worker that died go back into the queue and on from their last saved state. `train_in_workers` returns
when the queue has nothing more and every worker has ended.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from sweeps.trial_queue import TrialQueue
from training.exceptions import SweepError
from training.job import Engine, Job, JobOptions
from training.paths import write_json
from training.progress import Progress, duration

MOST_DEATHS = 5
"""Deaths of its workers without an evaluation between that fail a trial; of idle workers, the sweep."""
HANGS_S = 1800.0
"""A worker that trains and has shown no progress for so long hangs, and is killed."""
SAVING_S = 60.0
"""Longest that workers may take to save their trials when they are told to stop."""


@dataclass(kw_only=True, eq=False)
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    jobs: dict[int, Job] = field(default_factory=dict)
    """In its slots."""
    progress: dict[int, Progress] = field(default_factory=dict)
    asks: bool = False
    """It is idle and waits for a job."""
    heard_s: float = field(default_factory=time.monotonic)
    """When it has said something last."""


def train_in_workers(
    queue: TrialQueue, engine: Engine, options: JobOptions, num_workers: int, lock: IO[str]
) -> None:
    """Trains the queue's trials in `num_workers` processes.

    Args:
        queue: gives jobs and is told of them.
        engine: `packed` or `trl`.
        options: for the workers; `options.stop` ends all of them, their trials saved.
        num_workers: at most one per GPU.
        lock: the sweep's lock, which workers hold as well.

    Raises:
        KeyboardInterrupt: `options.stop` was set.
        SweepError: workers died again and again.
        Exception: what the queue raised, or a fault in a worker.
    """
    pool = _Pool(queue, engine, options, lock, num_workers)
    with options.display:
        try:
            for number in range(num_workers):
                pool.start(number)
            pool.run()
        finally:
            pool.end()


class _Pool:
    def __init__(
        self,
        queue: TrialQueue,
        engine: Engine,
        options: JobOptions,
        lock: IO[str],
        num_workers: int,
    ):
        self.queue, self.engine, self.options, self.lock = queue, engine, options, lock
        self.num_workers = num_workers
        self.workers: list[_Worker] = []
        self.num_deaths = 0
        """Of workers without a trial, in a row."""
        self.deaths: dict[int, int] = {}
        """Trial -> deaths of its workers since its last evaluation."""

    def start(self, number: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        descriptor = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "sweeps.worker", str(descriptor)],
            pass_fds=[descriptor, self.lock.fileno()],
            env={**os.environ, **worker_environment(number, self.num_workers)},
        )
        theirs.close()
        names = ("slots", "report_to", "group", "project", "entity", "log_model", "num_samples")
        ours.send((self.engine, {name: getattr(self.options, name) for name in names}))
        self.workers.append(_Worker(number=number, process=process, connection=ours))

    def run(self) -> None:
        while self.workers:
            if self.options.stop.is_set():
                raise KeyboardInterrupt
            connections: dict[Any, _Worker] = {w.connection: w for w in self.workers}
            for connection in wait(list(connections), timeout=0.5):
                worker = connections[connection]
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    self._ended(worker)
                    continue
                worker.heard_s = time.monotonic()
                self._handle(worker, *message)
            self._give_jobs()
            self._kill_hanging()
        if self.options.stop.is_set():
            raise KeyboardInterrupt  # the signal has ended the workers first

    def end(self) -> None:
        """Lets workers save what they train, and waits for them; nothing where all have ended."""
        for worker in self.workers:
            worker.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + SAVING_S
        for worker in self.workers:
            worker.connection.close()
            try:
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self.workers.clear()

    def _handle(self, worker: _Worker, kind: str, *args: Any) -> None:
        match kind:
            case "ask":
                self._answer(worker, *args)
            case "add":
                number, label, num_steps = args
                worker.progress[number] = self.options.display.add(label, num_steps)
            case "show":
                number, name, values, named = args
                getattr(worker.progress[number], name)(*values, **named)
                if name == "close":
                    del worker.progress[number]
            case "print":
                self.options.display.console.print(args[0])
            case "fault":
                error, trace = args
                error.add_note(f"In worker {worker.number}:\n{trace}")
                raise error

    def _answer(self, worker: _Worker, name: str, args: tuple[Any, ...]) -> None:
        if name == "next_job":
            if not worker.jobs:
                worker.asks = True  # answered by `_give_jobs`, which may have to wait for one
                return
            self._give(worker, self.queue.next_job())
            return
        number, *values = args
        job = worker.jobs[number]
        if name == "done":
            del worker.jobs[number]
        if name in ("done", "evaluated"):
            self.num_deaths = 0
            self.deaths.pop(number, None)
        _send(worker, getattr(self.queue, name)(job, *values))

    def _give_jobs(self) -> None:
        """Gives idle workers a job, or their end if there will be none."""
        for worker in self.workers:
            if not worker.asks:
                continue
            job = self.queue.next_job()
            if job is not None or self.queue.is_idle:
                worker.asks = False
                self._give(worker, job)

    def _kill_hanging(self) -> None:
        """A worker that has died is replaced at once; one that hangs has to be killed for that."""
        for worker in self.workers:
            # Before its first progress it may be downloading a model.
            if worker.progress and time.monotonic() - worker.heard_s > HANGS_S:
                self.options.display.console.print(
                    f"worker {worker.number} has shown no progress for {duration(HANGS_S)}: killed"
                )
                worker.process.kill()
                worker.heard_s = time.monotonic()

    def _give(self, worker: _Worker, job: Job | None) -> None:
        if job is not None:
            assert job.info is not None
            worker.jobs[job.info["number"]] = job
        _send(worker, job)

    def _ended(self, worker: _Worker) -> None:
        """Takes back the trials of a worker that has ended, and starts another one if it died."""
        self.workers.remove(worker)
        worker.connection.close()
        status = worker.process.wait()
        for progress in list(worker.progress.values()):
            progress.close()
        if self.options.stop.is_set():
            return  # it has got the same signal
        cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        for number, job in reversed(worker.jobs.items()):
            self._take_back(number, job, cause)
        if status == 0 and not worker.jobs:
            return
        self.num_deaths += not worker.jobs
        if self.num_deaths >= MOST_DEATHS:
            raise SweepError(
                f"{self.queue.paths.root}: workers died {self.num_deaths} times in a row, the last "
                f"by {cause}, before they had a trial"
            )
        self.options.display.console.print(
            f"worker {worker.number} died by {cause}: its {len(worker.jobs)} trials go on from their "
            "last saved state"
        )
        self.start(worker.number)

    def _take_back(self, number: int, job: Job, cause: str) -> None:
        """A trial whose worker has died goes on, unless it has been there at too many deaths."""
        self.deaths[number] = self.deaths.get(number, 0) + 1
        if self.deaths[number] < MOST_DEATHS or job.paths.result.is_file():
            self.queue.requeue(job)
            return
        reason = (
            f"its worker died {MOST_DEATHS} times before its next evaluation, the last by {cause}; "
            "fewer --slots need less memory"
        )
        write_json(job.paths.result, {"state": "failed", "reason": reason})
        self.queue.done(job, RuntimeError(reason))


def _send(worker: _Worker, answer: Any) -> None:
    with contextlib.suppress(OSError):  # it has died: the next `recv` says so
        worker.connection.send(answer)


def find_gpus() -> list[str]:
    """Names by which `CUDA_VISIBLE_DEVICES` knows the visible GPUs; none where there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]


def worker_environment(number: int, num_workers: int) -> dict[str, str]:
    """What a worker sees of the machine: its GPU, or its share of the cores."""
    gpus = find_gpus()
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
    if num_workers == 1:
        return {}
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {"OMP_NUM_THREADS": str(max(1, cores // num_workers))}
