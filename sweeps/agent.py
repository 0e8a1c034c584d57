"""Trains the runs of a W&B sweep, several at once in one pack: an agent in K slots.

W&B's server decides what is tried and when a run is stopped; here each of its runs is a trial in
`OUTPUT_DIR/NAME-SWEEP_ID/`, with the same files as a local sweep's. A trial without a result whose process is
gone, on this machine or on another that shares the directory, goes on from its last saved state first.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sweeps.directory import allocate_trial
from sweeps.ledger import METRIC, TrialRecord, read_sweep, read_trial
from sweeps.stages import Sharing, branch_points
from sweeps.study import search_space
from sweeps.sync import tell_again
from sweeps.terminal import first_line, make_console, params_text, print_summary
from sweeps.trial_queue import MAX_FAILURES_IN_A_ROW, MOST_BLOCKED
from sweeps.wandb_agents import Agents, Command
from sweeps.wandb_sweep import ENDED, WandbSweep, connect, open_directory, read_wandb_sweep
from training.cli import make_parser, parse, run_command
from training.config import TrialConfig
from training.exceptions import ConfigError, LoraloomError, SweepError
from training.interrupts import stops_gently
from training.job import STOPPED_IN_WANDB, Job, JobOptions, Outcome, Trials
from training.paths import SweepPaths, write_json
from training.progress import Display, duration
from training.tracking import LogModel

ANSWER_S = 2.0
"""Longest that a pack waits for an answer to what it asks; a later one comes between its steps."""

_DESCRIPTION = """\
Train runs of a W&B sweep, several at once in one pack, until the sweep ends.

  wandb sweep sweeps/configs/nine_runs.yaml                prints ENTITY/PROJECT/SWEEP_ID
  python -m sweeps.agent ENTITY/PROJECT/SWEEP_ID           on each machine; one per GPU

The same command goes on with what an agent that died has left in --output_dir."""


@dataclass(kw_only=True)
class AgentOptions:
    """Options of `python -m sweeps.agent`."""

    output_dir: str = field(
        default="runs",
        metadata={"help": "Directory of sweep directories; machines may share it."},
    )
    slots: int = field(
        default=0,
        metadata={"help": "Most runs at once; 0 is as many as memory and device make sense of."},
    )
    count: int | None = field(
        default=None, metadata={"help": "Runs that this agent takes; without it, all it is given."}
    )
    log_model: LogModel = field(
        default="none",
        metadata={"help": "Adapters uploaded to W&B: of every run (all), or when one is the best."},
    )


def main() -> None:
    parser = make_parser("sweeps.agent", _DESCRIPTION, [AgentOptions])
    parser.add_argument("sweep", help="ENTITY/PROJECT/SWEEP_ID, as `wandb sweep` prints it")
    options, positional = parse(parser)
    run_agent(positional.sweep, options)


def run_agent(path: str, options: AgentOptions) -> None:
    """Trains the sweep's runs until it ends, or `options.count` of them.

    Raises:
        ConfigError: an option is wrong, nobody is logged in, or there is no such sweep of ours.
        SweepError: the server refuses the agent, or runs failed in a row.
    """
    if options.slots < 0:
        raise ConfigError(f"--slots is {options.slots}, but must be >= 0")
    if options.count is not None and options.count < 1:
        raise ConfigError(f"--count is {options.count}, but must be >= 1")
    api = connect()
    sweep = read_wandb_sweep(path, api)
    paths = open_directory(sweep, Path(options.output_dir))
    console = make_console()
    job_options = JobOptions(
        slots=options.slots,
        group=sweep.definition.name,
        project=sweep.project,
        entity=sweep.entity,
        sweep_id=sweep.id,
        log_model=options.log_model,
        display=Display(console),
    )
    console.print(f"sweep {sweep.path} ({sweep.state.lower()}): {paths.root}")
    queue = AgentQueue(sweep, paths, api, job_options, options.count)
    try:
        with stops_gently(job_options.stop):
            queue.start()
            from training.run import run_jobs  # torch and transformers take seconds to import

            if not run_jobs(queue, engine="packed", options=job_options):
                queue.tell_missing()
    finally:
        queue.close()
    print_summary(read_sweep(paths.root), console)


class AgentQueue(Trials):
    """Runs as the server gives them, in the order in which stages can be shared.

    Args:
        sweep: the W&B sweep.
        paths: its directory here.
        api: `wandb.Api()`.
        options: of the pack; `stop` ends the waiting for runs.
        count: most runs to take.
    """

    def __init__(
        self,
        sweep: WandbSweep,
        paths: SweepPaths,
        api: Any,
        options: JobOptions,
        count: int | None = None,
    ):
        self.sweep, self.paths, self.options, self.count = sweep, paths, options, count
        self.say = options.display.console.print
        self.space = search_space(sweep.definition)
        self.sharing = Sharing.of(paths)
        self.agents = Agents(api, sweep, self._receive, self.say)
        self.changed = threading.Condition()
        self.waiting: list[Job] = []
        self.running: dict[int, Job] = {}
        self.locks: dict[int, FileLock] = {}
        self.num_taken = 0
        self.is_over = sweep.state in ENDED
        """The server has no more runs for us."""
        self.fault: Exception | None = None
        """What went wrong in the thread of the heartbeats."""
        self.failures: list[str] = []
        self.ended: set[str] = set()
        """Ids of the runs that this process has trained."""

    def start(self) -> None:
        """Takes over what other processes have left, and registers with the server."""
        for trial in read_sweep(self.paths.root).all_trials:
            if trial.result and trial.paths.wandb_receipt.is_file():
                continue
            lock = self._lock(trial.number)
            if lock is None:
                continue  # another agent has it
            trial = read_trial(trial.paths)  # its process may have ended it just now
            if trial.result:
                self._unlock(trial.number)
                self._tell_end(trial)
                continue
            job = self._job(trial.number, trial.config, trial.params, trial.wandb_id or "")
            self.waiting.append(job)
            self.agents.adopt(_run_id(job))
            self.say(f"{job.label} {job.name}: goes on (run {_run_id(job)})")
        if self.is_over and not self.waiting:
            self.say(f"the sweep is {self.sweep.state.lower()}: there are no runs to be had")
        else:
            self.agents.start()

    def close(self) -> None:
        if self.agents.thread.is_alive():
            self.agents.close()
        for lock in self.locks.values():
            lock.release()

    # What a pack asks and tells

    def next_job(self) -> Job | None:
        with self.changed:
            while True:
                if self.fault is not None:
                    raise self.fault
                job = self._take_ready()
                if job is not None:
                    number = job.number
                    self.running[number] = job
                    self.sharing.began(number, job)
                    return job
                if not self._wants_more():
                    return None  # what waits here waits for one that runs
                if self.options.stop.is_set():
                    raise KeyboardInterrupt
                if not self.agents.wants:
                    self._ask()
                elif self.running:
                    return None  # asked before: the answer comes while the others train
                else:
                    self.changed.wait(0.5)

    def began(self, job: Job, step: int) -> str | None:
        with self.changed:
            self.sharing.passed(job.number, step)
        return None

    def stored(self, job: Job, step: int) -> None:
        with self.changed:
            self.sharing.stored_by(job.number, job, step)

    def done(self, job: Job, outcome: Outcome) -> None:
        number = job.number
        with self.changed:
            self.running.pop(number, None)
            self.sharing.ended(number)
        self._unlock(number)
        self.agents.free(_run_id(job))
        self.ended.add(_run_id(job))
        if isinstance(outcome, LoraloomError):
            raise outcome  # wrong data, model or settings: the next run would meet it, too
        if isinstance(outcome, Exception):
            self._count_failure(job, f"{type(outcome).__name__}: {first_line(outcome)}")
        elif outcome["state"] == "failed":
            self._count_failure(job, outcome["reason"])
        else:
            self.failures.clear()
            loss = outcome.get(METRIC)
            shown = "no evaluation" if loss is None else f"{METRIC} {loss:.4f}"
            reason = f", pruned: {outcome['reason']}" if outcome["state"] == "pruned" else ""
            self.say(
                f"{job.label} {job.name}: {shown}{reason}, {duration(outcome['train_time_s'])}"
            )

    def tell_missing(self) -> None:
        """Once more what W&B did not take when the trial ended."""
        for trial in read_sweep(self.paths.root).all_trials:
            is_ours = trial.wandb_id in self.ended
            if is_ours and not trial.paths.wandb_receipt.is_file():
                self._tell_end(trial)
        self.options.close_trackers()

    def _tell_end(self, trial: TrialRecord) -> None:
        """A trial that ended when W&B was not there, or just before its process was killed."""
        if trial.wandb_id:
            job = self._job(trial.number, trial.config, trial.params, trial.wandb_id)
            tell_again(self.options.tracker(job), trial)

    # Between the pack and the server

    def _take_ready(self) -> Job | None:
        ready = [job for job in self.waiting if not self.sharing.is_worth_waiting(job)]
        if not ready:
            return None
        # As in a local sweep: what has been saved first, then the shortest.
        job = min(ready, key=lambda job: (not job.paths.state.is_dir(), job.config.max_steps))
        self.waiting.remove(job)
        return job

    def _wants_more(self) -> bool:
        has_taken_all = self.count is not None and self.num_taken >= self.count
        return not (self.is_over or has_taken_all or len(self.waiting) >= MOST_BLOCKED)

    def _ask(self) -> None:
        """Asks for one more run, and waits a moment for it: an answer is a round trip."""
        beats = self.agents.num_beats
        self.agents.ask()
        self.changed.wait_for(
            lambda: self.waiting or self.is_over or self.agents.num_beats > beats, ANSWER_S
        )

    def _receive(self, command: Command) -> None:
        """In the thread of the heartbeats."""
        with self.changed:
            try:
                self._obey(command)
            except Exception as error:  # noqa: BLE001 - raised where the pack asks next
                self.fault = error
            self.changed.notify_all()

    def _obey(self, command: Command) -> None:
        if command.kind == "run":
            assert command.run_id is not None
            self._take(command.run_id, command.params)
            return
        if command.kind == "refused":
            raise SweepError(f"{self.sweep.path}: {command.reason}")
        if command.kind == "exit":
            self.is_over = True
        for job in [*self.running.values(), *self.waiting]:
            if command.run_id is not None and _run_id(job) == command.run_id:
                job.stop_reason = STOPPED_IN_WANDB

    def _take(self, run_id: str, params: dict[str, Any]) -> None:
        """Gives a run its directory, before anything can fail."""
        known = self._known(run_id)
        if known is not None:
            self.waiting.append(known)
            return
        settings = {**self.sweep.definition.constants, **params}
        config = TrialConfig.from_dict(settings, f"{self.sweep.path}: run {run_id}")
        number = allocate_trial(self.paths)
        self._lock(number)
        varied = {name: settings[name] for name in self.sweep.definition.varied if name in settings}
        job = self._job(number, config, varied, run_id)
        write_json(job.paths.config, {"settings": config.to_dict(), **(job.info or {})})
        self.num_taken += 1
        self.waiting.append(job)
        self.say(f"{job.label} {job.name} (run {run_id})")

    def _known(self, run_id: str) -> Job | None:
        """A run that the server hands out again."""
        for trial in read_sweep(self.paths.root).all_trials:
            if trial.wandb_id == run_id and trial.number not in self.locks:
                lock = self._lock(trial.number)
                if lock is not None:
                    trial.paths.result.unlink(missing_ok=True)
                    return self._job(trial.number, trial.config, trial.params, run_id)
        return None

    def _job(self, number: int, config: TrialConfig, params: dict[str, Any], run_id: str) -> Job:
        info = {
            "number": number,
            "name": params_text(params),
            "params": params,
            "retry_of": None,
            "seed_of": None,
            "sweep": self.sweep.definition.name,
            "wandb_id": run_id,
        }
        return Job(
            config=config,
            paths=self.paths.trial(number),
            info=info,
            label=f"trial {number}",
            stages=self.paths.stages,
            branches=branch_points(self.space, config),
        )

    def _lock(self, number: int) -> FileLock | None:
        """Held while the trial is in flight; the kernel frees it when its process ends."""
        lock = FileLock(self.paths.trial_lock(number), thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        self.locks[number] = lock
        return lock

    def _unlock(self, number: int) -> None:
        self.locks.pop(number).release()

    def _count_failure(self, job: Job, cause: str) -> None:
        self.say(f"{job.label} {job.name}: failed: {cause}")
        self.failures.append(f"{job.label}: {cause}")
        if len(self.failures) >= MAX_FAILURES_IN_A_ROW:
            raise SweepError(
                f"{self.paths.root}: {len(self.failures)} runs failed in a row, so the agent stops; "
                f"the first was {self.failures[0]}"
            )


def _run_id(job: Job) -> str:
    assert job.info is not None
    return job.info["wandb_id"]


if __name__ == "__main__":
    run_command(main)
