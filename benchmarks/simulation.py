"""A sweep in virtual time: the real queue and study, and packs that only count their steps.

`Simulation` stands in for `sweeps.pool`, `training.pack` and the training: it asks a sweep's `TrialQueue` for
jobs and tells it what becomes of them, in the order in which a pack does. The state of a simulated trial is
the sum of its learning rates, from which its losses follow, so that one that was forked wrongly shows. No
clock is read: the numbers are the same on every machine.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from rich.console import Console

from sweeps.ledger import METRIC
from sweeps.pruning import build_pruner
from sweeps.spec import SweepDefinition
from sweeps.study import build_sampler, planned_points, scheduler_study
from sweeps.trial_queue import TrialQueue
from training.config import TrialConfig
from training.job import Job
from training.paths import SweepPaths, TrialPaths
from training.progress import Display
from training.schedules import learning_rate
from training.stage import Stage, prefix_hash

SLOTS = 8
BASE_LOSS = 3.5


# Time


def on_full_device(num_trials: int) -> float:
    """Time of a pack's step where one trial fills the device, as on a CPU: packing gains nothing."""
    return float(num_trials)


def on_idle_device(num_trials: int) -> float:
    """Time of a pack's step where all its trials together do not fill the device, as on a large GPU."""
    return 1.0


# Losses


@dataclass(frozen=True, kw_only=True, slots=True)
class Landscape:
    """Validation loss, nats a token, of a trial by its settings, step and sum of learning rates.

    The loss falls with the sum of the rates. The rate of the moment keeps it up, which a cooldown ends; a
    high peak leaves something for good. So low rates may lead early and lose in the end.
    """

    distance: float = 0.05
    """Sum of rates in which the loss falls to a share of 1/e."""
    unrest: float = 300.0
    """Loss by the rate of the moment."""
    damage: float = 0.05
    """Loss that a peak of 1e-3 leaves."""
    rank: float = 0.01
    """What twice the rank gains."""
    noise: float = 0.0
    """Standard deviation of an evaluation."""
    seed: int = 0

    def __call__(self, config: TrialConfig, step: int, travelled: float) -> float:
        rate, peak = learning_rate(config, step - 1), config.learning_rate
        loss = 2.6 + 0.8 * math.exp(-travelled / self.distance) + self.unrest * rate
        loss += self.damage * (peak / 1e-3) ** 2 - self.rank * math.log2(config.lora_r)
        if self.noise:
            # The same for trials that share the step, as forking takes it over.
            key = f"{self.seed} {peak} {config.lora_r} {step}"
            loss += random.Random(key).gauss(0, self.noise)
        return loss + 0.01 * (config.seed * 0.6180339887 % 1)


def landscapes(num: int) -> list[Landscape]:
    """Different ones, so that no result hangs on a single one."""
    draw = random.Random(1)
    return [
        Landscape(
            distance=10 ** draw.uniform(-1.8, -0.6),
            unrest=draw.uniform(20, 400),
            damage=draw.uniform(0, 0.15),
            rank=draw.uniform(-0.02, 0.02),
            noise=draw.uniform(0, 0.02),
            seed=seed,
        )
        for seed in range(num)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A trial between two steps, as it is saved and forked."""

    step: int = 0
    travelled: float = 0.0
    """Sum of the learning rates so far: what stands for the weights."""
    evals: tuple[tuple[int, float], ...] = ((0, BASE_LOSS),)
    """Steps and losses."""
    forked_from: dict[str, Any] | None = None
    steps_saved: int = 0


@dataclass(kw_only=True)
class SimulatedTrial:
    """A trial in a slot: counterpart of `training.trial.TrialState` and its recorder."""

    job: Job
    step: int
    travelled: float
    evals: list[tuple[int, float]]
    forked_from: dict[str, Any] | None
    steps_saved: int
    loss: Landscape

    @classmethod
    def at(cls, snapshot: Snapshot, job: Job, loss: Landscape) -> "SimulatedTrial":
        return cls(
            job=job,
            loss=loss,
            step=snapshot.step,
            travelled=snapshot.travelled,
            evals=list(snapshot.evals),
            forked_from=snapshot.forked_from,
            steps_saved=snapshot.steps_saved,
        )

    @classmethod
    def alone(cls, config: TrialConfig, loss: Landscape) -> "SimulatedTrial":
        """The trial at its end, trained by itself: what any schedule must come to."""
        trial = cls.at(Snapshot(), Job(config=config, paths=TrialPaths(Path())), loss)
        while not trial.is_done:
            trial.take_step()
            if trial.step % config.eval_steps == 0 or trial.is_done:
                trial.evaluate()
        return trial

    @property
    def number(self) -> int:
        assert self.job.info is not None
        return self.job.info["number"]

    @property
    def is_done(self) -> bool:
        return self.step >= self.job.config.max_steps

    def take_step(self) -> None:
        self.travelled += learning_rate(self.job.config, self.step)
        self.step += 1

    def evaluate(self) -> float:
        self.evals.append((self.step, self.loss(self.job.config, self.step, self.travelled)))
        return self.evals[-1][1]

    def capture(self) -> Snapshot:
        return Snapshot(
            step=self.step,
            travelled=self.travelled,
            evals=tuple(self.evals),
            forked_from=self.forked_from,
            steps_saved=self.steps_saved,
        )

    def result(self, state: str, reason: str | None) -> dict[str, Any]:
        best_loss, best_step = min(((loss, step) for step, loss in self.evals[1:]), default=(0, 0))
        return {
            "state": state,
            "reason": reason,
            "best_step": best_step,
            METRIC: best_loss,
            f"base_{METRIC}": BASE_LOSS,
            "num_steps": self.step,
            "train_time_s": 0.0,
            "forked_from": self.forked_from,
            "steps_saved": self.steps_saved,
        }


@dataclass
class Disk:
    """What is saved, and so outlives a worker or the whole process; small files say the same to the queue."""

    states: dict[int, Snapshot] = field(default_factory=dict)
    stages: dict[str, Snapshot] = field(default_factory=dict)
    """By `prefix_hash`: base model and data are the same for all."""

    def save(self, trial: SimulatedTrial) -> None:
        self.states[trial.number] = trial.capture()
        trial.job.paths.state.mkdir(exist_ok=True)

    def forget(self, trial: SimulatedTrial) -> None:
        if self.states.pop(trial.number, None) is not None:
            shutil.rmtree(trial.job.paths.state)

    def store(self, trial: SimulatedTrial) -> None:
        config, stages = trial.job.config, trial.job.stages
        assert stages is not None
        prefix = prefix_hash(config, trial.step)
        if prefix in self.stages:
            return
        name = prefix[:16]
        origin = {"stage": name, "step": trial.step, "trial": trial.job.paths.root.name}
        self.stages[prefix] = Snapshot(
            step=trial.step,
            travelled=trial.travelled,
            evals=tuple(trial.evals),
            forked_from=origin,
            steps_saved=trial.step,
        )
        stage = Stage(step=trial.step, prefix=prefix, trial=origin["trial"], settings=vars(config))
        write(stages / name / "stage.json", asdict(stage))

    def fork(self, config: TrialConfig) -> Snapshot | None:
        """The longest stage that the trial shares."""
        steps = {stage.step for stage in self.stages.values() if stage.step <= config.max_steps}
        hashes = (prefix_hash(config, step) for step in sorted(steps, reverse=True))
        return next((self.stages[prefix] for prefix in hashes if prefix in self.stages), None)


def write(path: Path, value: Mapping[str, Any]) -> None:
    """JSON, without the fsync of `training.paths.write_json`, which is most of the time here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@dataclass(eq=False)
class Worker:
    """A process with one pack."""

    trials: list[SimulatedTrial] = field(default_factory=list)
    """In its slots, the oldest first."""
    due: float = math.inf
    """When the step that it takes ends; infinite between steps."""


@dataclass(kw_only=True)
class Simulation:
    """Workers that train a queue's trials in virtual time.

    Args:
        queue: gives jobs and is told of them.
        slots: most trials at once in a worker.
        num_workers: at least one.
        step_time: of a pack's step, by the number of its trials.
        deaths: when which worker dies, with all that it has not saved.
        landscape: of the losses.
        disk: what was saved before.
        watch: called whenever workers have been given what there is, and a slot of one is still free.
    """

    queue: TrialQueue
    slots: int = SLOTS
    num_workers: int = 1
    step_time: Callable[[int], float] = on_full_device
    deaths: list[tuple[float, int]] = field(default_factory=list)
    landscape: Landscape = field(default_factory=Landscape)
    disk: Disk = field(default_factory=Disk)
    watch: Callable[["Simulation"], None] = lambda simulation: None
    time: float = 0.0
    trained: list[tuple[int, int]] = field(default_factory=list)
    """Trial and step, in the order of training."""
    ended: list[float] = field(default_factory=list)
    """When trials ended."""
    lost: list[tuple[int, int, int]] = field(default_factory=list)
    """Trial, step at which its worker died, and the last of its steps that is saved."""

    def __post_init__(self) -> None:
        self.workers = [Worker() for _ in range(self.num_workers)]
        self.deaths = sorted(self.deaths)

    @property
    def in_flight(self) -> list[SimulatedTrial]:
        return [trial for worker in self.workers for trial in worker.trials]

    def run(self, until: float = math.inf) -> "Simulation":
        """Trains until the queue has nothing and every slot is empty, or the time is `until`."""
        while True:
            self._fill_workers()
            worker = min(self.workers, key=lambda worker: worker.due)
            if worker.due == math.inf:
                return self
            dies = bool(self.deaths) and self.deaths[0][0] < worker.due
            self.time = max(self.time, self.deaths[0][0] if dies else worker.due)
            if self.time > until:
                return self
            if dies:
                self._die(self.workers[self.deaths.pop(0)[1]])
            else:
                self._step(worker)

    def loss_of(self, trial: SimulatedTrial) -> tuple[int, int, int]:
        """What goes if the trial's worker dies now."""
        state = self.disk.states.get(trial.number)
        stage = self.disk.fork(trial.job.config) if state is None else None
        return trial.number, trial.step, max((s.step for s in (state, stage) if s), default=0)

    # What `sweeps.pool` does

    def _fill_workers(self) -> None:
        """Gives jobs to the workers that stand between two steps, until there are none for them."""
        asking = [worker for worker in self.workers if worker.due == math.inf]
        while any(self._fill(worker) for worker in asking):
            pass  # what one has ended at once may have freed a trial for another
        if any(len(worker.trials) < self.slots for worker in asking):
            self.watch(self)
        for worker in asking:
            if worker.trials:
                worker.due = self.time + self.step_time(len(worker.trials))

    def _die(self, worker: Worker) -> None:
        self.lost += [self.loss_of(trial) for trial in worker.trials]
        for trial in reversed(worker.trials):
            self.queue.requeue(trial.job)
        worker.trials.clear()
        worker.due = math.inf

    # What `training.pack` does

    def _fill(self, worker: Worker) -> bool:
        """Whether there was a job."""
        given = False
        while len(worker.trials) < self.slots:
            job = self.queue.next_job()
            if job is None:
                break
            given = True
            trial = self._admit(job)
            worker.trials.append(trial)
            self._begin(worker, trial)
        return given

    def _admit(self, job: Job) -> SimulatedTrial:
        assert job.info is not None
        snapshot = self.disk.states.get(job.info["number"])
        if snapshot is None:
            shutil.rmtree(job.paths.root, ignore_errors=True)
            if job.stages is not None:
                snapshot = self.disk.fork(job.config)
        write(job.paths.config, {"settings": vars(job.config), "engine": "none", **job.info})
        trial = SimulatedTrial.at(snapshot or Snapshot(), job, self.landscape)
        if snapshot is not None:
            self._write_metrics(trial)  # the queue reads what came before
        return trial

    def _begin(self, worker: Worker, trial: SimulatedTrial) -> None:
        reason = self.queue.began(trial.job, trial.step)
        if reason is not None:
            self._end(worker, trial, "pruned", reason)
        elif trial.is_done:
            if trial.evals[-1][0] != trial.step:
                trial.evaluate()
            self._end(worker, trial, "complete")

    def _step(self, worker: Worker) -> None:
        worker.due = math.inf
        for trial in list(worker.trials):
            trial.take_step()
            self.trained.append((trial.number, trial.step))
            self._record(worker, trial)

    def _record(self, worker: Worker, trial: SimulatedTrial) -> None:
        job = trial.job
        is_due = trial.step % job.config.eval_steps == 0
        loss = trial.evaluate() if is_due else math.nan
        if trial.step in job.branches:
            self._store(trial)
        if trial.is_done:
            if not is_due:
                trial.evaluate()
            self._end(worker, trial, "complete")
        elif is_due:
            self.disk.save(trial)
            reason = self.queue.evaluated(job, trial.step, loss)
            if reason is not None:
                if any(step > trial.step for step in job.branches):
                    self._store(trial)
                self._end(worker, trial, "pruned", reason)

    def _store(self, trial: SimulatedTrial) -> None:
        self.disk.store(trial)
        self.queue.stored(trial.job, trial.step)

    def _end(
        self, worker: Worker, trial: SimulatedTrial, state: str, reason: str | None = None
    ) -> None:
        worker.trials.remove(trial)
        self.ended.append(self.time)
        result = trial.result(state, reason)
        self._write_metrics(trial)
        write(trial.job.paths.result, result)
        self.disk.forget(trial)
        self.queue.done(trial.job, result)

    def _write_metrics(self, trial: SimulatedTrial) -> None:
        lines = [json.dumps({"step": step, METRIC: loss}) + "\n" for step, loss in trial.evals]
        trial.job.paths.metrics.write_text("".join(lines), encoding="utf-8")


class _Silent(Console):
    """Rich's own `quiet` lays out every line before it drops it."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        pass


def make_queue(
    definition: SweepDefinition,
    root: Path,
    *,
    kind: type[TrialQueue] = TrialQueue,
    study: optuna.Study | None = None,
    **options: Any,
) -> TrialQueue:
    """A sweep's queue as `sweeps.run` makes it, without output.

    Args:
        definition: the sweep.
        root: its directory.
        kind: the queue's class.
        study: without it, a new one in memory, with the definition's sampler and pruner.
        options: more for the queue.
    """
    paths = SweepPaths(root)
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.definition.write_text(definition.text, encoding="utf-8")
    study = study or study_in_memory(definition)
    planned = planned_points(study, definition)
    num_trials = definition.run_cap if planned is None else len(planned)
    console = _Silent()
    return kind(
        **{
            "definition": definition,
            "paths": paths,
            "study": study,
            "num_trials": num_trials,
            "console": console,
            "display": Display(console),
            **options,
        }
    )


def study_in_memory(definition: SweepDefinition) -> optuna.Study:
    sampler: BaseSampler | None = build_sampler(definition)
    pruner = build_pruner(definition)
    if definition.config.get("scheduler"):
        built = scheduler_study(definition)
        sampler, pruner = built.sampler, built.pruner
    return optuna.create_study(sampler=sampler, pruner=pruner)
