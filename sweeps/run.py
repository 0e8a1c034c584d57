"""Runs a sweep here, several trials in one pack, or continues it: the same command after a crash.

definition -> study (ask) -> TrialConfig -> training.run.run_jobs -> result.json -> study (tell).
The study and the trial directories say between them what is done: a RUNNING trial with a result is
told, one without goes on under its number, a failed one is queued again each time the command
starts. The study carries the definition's pruner, but a trial trained here is not stopped early.
"""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

from sweeps.directory import check_directory, copy_known, find_known, locked, write_definition
from sweeps.ledger import METRIC, SweepRecord, read_sweep
from sweeps.one_factor import COMBINATION, NAME_ATTR, OneFactorSampler
from sweeps.spec import SweepDefinition, read_definition
from sweeps.study import build_sampler, open_study, planned_points, search_space
from sweeps.terminal import first_line, make_console, params_text, print_summary
from training.cli import make_parser, parse, run_command
from training.config import TrialConfig
from training.exceptions import ConfigError, LoraloomError, SweepError
from training.job import Engine, Job, JobOptions, Outcome
from training.paths import SweepPaths, read_json
from training.progress import Display, duration

MAX_FAILURES_IN_A_ROW = 3
RETRY_ATTR = "retry_of"
_GRID_ATTRS = ("grid_id", "search_space")

_DESCRIPTION = """\
Run the sweep that a YAML file defines, or continue it: the same command after a crash or Ctrl-C
trains exactly what is unfinished or failed. Results go to OUTPUT_DIR/NAME/.

  python -m sweeps.run sweeps/configs/quickstart.yaml"""


@dataclass(kw_only=True)
class RunOptions:
    """Options of `python -m sweeps.run`."""

    output_dir: str = field(default="runs", metadata={"help": "Directory of sweep directories."})
    num_trials: int | None = field(
        default=None,
        metadata={
            "help": "Trials in all; needed for random and bayes without run_cap, otherwise a limit."
        },
    )
    report_to: Literal["wandb", "none"] = field(
        default="wandb", metadata={"help": "Tracker, besides the files that are always written."}
    )
    engine: Engine = field(
        default="packed",
        metadata={"help": "packed trains several trials at once; trl is SFTTrainer, one by one."},
    )
    slots: int = field(
        default=0,
        metadata={"help": "Most trials at once; 0 is as many as memory and device make sense of."},
    )
    project: str | None = field(
        default=None,
        metadata={"help": "W&B project; without it the definition's own, or loraloom."},
    )


def main() -> None:
    parser = make_parser("sweeps.run", _DESCRIPTION, [RunOptions])
    parser.add_argument("config", help="sweep definition, e.g. sweeps/configs/quickstart.yaml")
    options, positional = parse(parser)
    run_sweep(read_definition(positional.config), options)


def run_sweep(definition: SweepDefinition, options: RunOptions) -> SweepRecord:
    """Runs or continues the sweep; returns its directory read back.

    Raises:
        ConfigError: the definition does not say how many trials there are.
        SweepError: the directory is in use or another sweep's, or trials failed in a row.
    """
    if options.slots < 0:
        raise ConfigError(f"--slots is {options.slots}, but must be >= 0")
    paths = SweepPaths(Path(options.output_dir) / definition.name)
    check_directory(definition, paths)
    with locked(paths):
        study = open_study(definition, paths)
        try:
            num_trials = _num_trials(definition, study, options)
            write_definition(definition, paths)
            run = _Run(definition, options, paths, study, num_trials)
            run.train_all()
        except optuna.exceptions.StorageInternalError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise SweepError(f"{paths.study}: cannot be written: {reason}") from error
        finally:
            _close(study)
    record = read_sweep(paths.root)
    print_summary(record, run.console)
    return record


@dataclass
class _Run:
    """One start of the command on one sweep."""

    definition: SweepDefinition
    options: RunOptions
    paths: SweepPaths
    study: optuna.Study
    num_trials: int | None
    """Trials in all, retries not counted; None if the sampler says when it is done."""
    console: Console = field(default_factory=make_console)
    failures: list[str] = field(default_factory=list)
    """Causes of the trials that failed since the last one that did not."""
    unfinished: list[FrozenTrial] = field(default_factory=list)
    """Trials of an earlier start that have no result yet."""
    running: dict[int, TrialConfig] = field(default_factory=dict)
    """Settings of the trials in the pack, by number."""
    waiting: list[Job] = field(default_factory=list)
    """Trials with the settings of one that is running: they will take its result."""
    started: float = field(default_factory=time.monotonic)
    num_steps: int = 0
    """Steps of the trials that have ended since."""

    def __post_init__(self) -> None:
        self.display = Display(self.console)
        self.distributions = search_space(self.definition)
        self.planned = planned_points(self.study, self.definition)

    def train_all(self) -> None:
        from training.run import run_jobs  # loads torch and transformers: only when training

        self.unfinished = self._settle_interrupted()
        failed = self._failed()
        num_done = self._num_counted(finished_only=True)
        self.console.print(f"sweep {self.definition.name}: {self.paths.root}")
        if num_done:
            self.console.print(f"{num_done} of {self.num_trials or '?'} trials are already there")
        for frozen in failed:
            self.study.add_trial(_retry(frozen))
        if entity := self.definition.config.get("entity"):
            os.environ.setdefault("WANDB_ENTITY", entity)
        options = JobOptions(
            slots=self.options.slots,
            report_to=self.options.report_to,
            group=self.definition.name,
            project=self.options.project or self.definition.config.get("project") or "loraloom",
            display=self.display,
        )
        run_jobs(self._next_job, self._done, engine=self.options.engine, options=options)

    def _settle_interrupted(self) -> list[FrozenTrial]:
        """Tells the study what a killed process could not; returns the trials to go on with."""
        unfinished = []
        for frozen in self.study.get_trials(states=[TrialState.RUNNING]):
            result = self.paths.trial(frozen.number).result
            if result.is_file():
                self._tell(frozen.number, read_json(result))
            else:
                unfinished.append(frozen)
        return unfinished

    def _failed(self) -> list[FrozenTrial]:
        """The failed trials that none repeats yet."""
        trials = self.study.get_trials(deepcopy=False)
        repeated = {trial.user_attrs.get(RETRY_ATTR) for trial in trials}
        return [
            trial
            for trial in trials
            if trial.state == TrialState.FAIL and trial.number not in repeated
        ]

    def _next_job(self) -> Job | None:
        """The next trial to train; None where there is none before one that is running has ended."""
        while True:
            self._copy_known_of_waiting()
            if self.unfinished:
                frozen = self.unfinished.pop(0)
                self._reseed(frozen.number)
                job = self._job(optuna.trial.Trial(self.study, frozen._trial_id))
            elif self._wants_another():
                self._reseed(len(self.study.get_trials(deepcopy=False)))
                job = self._job(self.study.ask())
            else:
                return None
            if job is None or self._takes_known(job):
                continue
            if job.config in self.running.values():
                self.waiting.append(job)
                continue
            self.running[_number(job)] = job.config
            return job

    def _wants_another(self) -> bool:
        if self.study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            return True
        target = self.definition.target
        if target is not None and (self._best() or (0, math.inf))[1] <= target:
            return False
        num_counted = self._num_counted()
        sampler = self.study.sampler
        if isinstance(sampler, OneFactorSampler):
            if num_counted >= (self.num_trials or sampler.num_trials):
                # A retry may have changed what is best: then the combination is tried again, unless
                # the number of trials is the user's.
                is_capped = (
                    self.options.num_trials is not None or self.definition.run_cap is not None
                )
                return not is_capped and not self.running and not sampler.is_exhausted(self.study)
            # The combination needs the results of all others.
            return not sampler.waits_for_results(self.study)
        if self.num_trials is not None and num_counted >= self.num_trials:
            return False
        is_exhausted = getattr(sampler, "is_exhausted", None)  # of Optuna's GridSampler and others
        return not (is_exhausted and is_exhausted(self.study))

    def _reseed(self, number: int) -> None:
        if self.definition.method in ("random", "bayes"):
            sampler = build_sampler(self.definition, number)
            assert sampler is not None
            self.study.sampler = sampler

    def _job(self, trial: optuna.Trial) -> Job | None:
        """The trial with its settings; None if these are refused, which has been told."""
        # As Study.ask does for its `fixed_distributions`; what was suggested before is kept.
        params = {name: trial._suggest(name, dist) for name, dist in self.distributions.items()}
        info = {
            "number": trial.number,
            "name": trial.user_attrs.get(NAME_ATTR) or params_text(params),
            "params": params,
            "retry_of": trial.user_attrs.get(RETRY_ATTR),
            "sweep": self.definition.name,
        }
        label = f"trial {trial.number}"
        shown = "" if info["name"] == params_text(params) else f": {params_text(params)}"
        retry = (
            f", again for failed trial {info['retry_of']}" if info["retry_of"] is not None else ""
        )
        self.console.print(f"{label}{self._position()} {info['name']}{shown}{retry}")
        try:
            config = self.definition.trial_config(params)
        except LoraloomError:
            self._tell(trial.number, {"state": "failed"})
            raise  # wrong settings: the next trial would meet them, too
        return Job(config=config, paths=self.paths.trial(trial.number), info=info, label=label)

    def _takes_known(self, job: Job) -> bool:
        """Copies the trial from the one that had exactly these settings, if there is one."""
        known = find_known(job.config, self.paths)
        if known is None:
            return False
        assert job.info is not None
        self._done(job, copy_known(known, job.paths, job.config, job.info))
        return True

    def _copy_known_of_waiting(self) -> None:
        """Gives the trials that waited for one with the same settings its result, or their turn."""
        for job in list(self.waiting):
            if job.config in self.running.values():
                continue
            self.waiting.remove(job)
            if not self._takes_known(job):  # the one that it waited for has failed
                self.unfinished.insert(0, self._frozen(_number(job)))

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _done(self, job: Job, outcome: Outcome) -> None:
        number, label = _number(job), f"{job.label} {(job.info or {})['name']}"
        self.running.pop(number, None)
        if isinstance(outcome, Exception):
            self._tell(number, {"state": "failed"})
            if isinstance(outcome, LoraloomError):
                raise outcome  # wrong data, model or settings: the next trial would meet it, too
            self._count_failure(label, f"{type(outcome).__name__}: {first_line(outcome)}")
        else:
            self._tell(number, outcome)
            self._finish(label, outcome)

    def _count_failure(self, label: str, cause: str) -> None:
        self.console.print(f"{label}: failed: {cause}")
        self.failures.append(f"{label}: {cause}")
        if len(self.failures) >= MAX_FAILURES_IN_A_ROW:
            raise SweepError(
                f"{self.paths.root}: {len(self.failures)} trials failed in a row, so the sweep "
                f"stops; the first was {self.failures[0]}"
            )

    def _tell(self, number: int, result: dict[str, Any]) -> None:
        state, loss = result.get("state"), result.get(METRIC)
        try:
            if state == "pruned":
                self.study.tell(number, state=TrialState.PRUNED)
            elif state == "complete" and loss is not None and math.isfinite(loss):
                self.study.tell(number, loss)
            else:
                self.study.tell(number, state=TrialState.FAIL)
        except RuntimeError as error:
            # GridSampler ends a study through Study.stop, which only optimize() knows; the result
            # is stored by then (Optuna issue 4121, and W&B's Optuna scheduler does the same).
            if "Study.stop" not in str(error):
                raise

    def _finish(self, label: str, result: dict[str, Any]) -> None:
        loss = result.get(METRIC)
        if result.get("state") == "failed" or loss is None or not math.isfinite(loss):
            self._count_failure(label, result.get("reason") or f"{METRIC} is {loss}")
            return
        self.failures.clear()
        if "same_as" in result:
            taken = f"as in trial {result['same_as']}, which had the same settings"
        else:
            self.num_steps += result.get("num_steps") or 0
            taken = duration(result.get("train_time_s") or 0)
        best = self._best()
        shown = f", best so far {best[1]:.4f} (trial {best[0]})" if best else ""
        self.console.print(f"{label}: {METRIC} {loss:.4f}{shown}, {taken}{self._time_left()}")

    def _best(self) -> tuple[int, float] | None:
        trials = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        scored = [(trial.value, trial.number) for trial in trials if trial.value is not None]
        return (min(scored)[1], min(scored)[0]) if scored else None

    def _num_counted(self, *, finished_only: bool = False) -> int:
        """Trials that count: those that a retry repeats do not."""
        trials = self.study.get_trials(deepcopy=False)
        repeated = {trial.user_attrs.get(RETRY_ATTR) for trial in trials}
        return sum(
            trial.number not in repeated and (trial.state.is_finished() or not finished_only)
            for trial in trials
        )

    def _position(self) -> str:
        if self.num_trials is None:
            return ""
        number = self._num_counted(finished_only=True) + 1
        return f" ({number} of {max(number, self.num_trials)})"

    def _time_left(self) -> str:
        if self.num_trials is None or not self.display.num_steps:
            return ""
        done = self.study.get_trials(deepcopy=False)
        num_left = self.num_trials - self._num_counted(finished_only=True)
        if num_left <= 0:
            return ""
        if self.planned is None:
            steps_left = num_left * self._mean_steps([trial.params for trial in done])
        else:
            tried = [trial.params for trial in done if trial.state.is_finished()]
            points = [point for point in self.planned if point not in tried]
            steps_left = min(num_left, len(points)) * self._mean_steps(points)
        steps_left -= self.display.num_steps - self.num_steps  # of the trials in the pack
        pace_s = (time.monotonic() - self.started) / self.display.num_steps
        return f", about {duration(max(0, steps_left) * pace_s)} left"

    def _mean_steps(self, points: list[dict[str, Any]]) -> float:
        default = self.definition.constants.get("max_steps", TrialConfig.max_steps)
        steps = [point.get("max_steps", default) for point in points]
        return sum(steps) / max(1, len(steps))


def _num_trials(
    definition: SweepDefinition, study: optuna.Study, options: RunOptions
) -> int | None:
    """How many trials the sweep has in all; None if only its sampler knows."""
    if options.num_trials is not None and options.num_trials < 1:
        raise ConfigError(f"--num_trials is {options.num_trials}, but must be >= 1")
    limit = options.num_trials if options.num_trials is not None else definition.run_cap
    planned = planned_points(study, definition)
    if planned is not None:
        return min(len(planned), limit or len(planned))
    if limit is None and not hasattr(study.sampler, "is_exhausted"):
        raise ConfigError(
            f"{definition.path}: run_cap is missing, but method {definition.method} needs it "
            "(or --num_trials) to end"
        )
    return limit


def _number(job: Job) -> int:
    assert job.info is not None
    return job.info["number"]


def _retry(trial: FrozenTrial) -> FrozenTrial:
    """A waiting copy of a failed trial. GridSampler needs its own attributes on it as well."""
    name = trial.user_attrs.get(NAME_ATTR)
    # The combination is made anew: retries before it may have changed what is best.
    params = {} if name == COMBINATION else trial.params
    grid = {key: trial.system_attrs[key] for key in _GRID_ATTRS if key in trial.system_attrs}
    return create_trial(
        state=TrialState.WAITING,
        system_attrs={**grid, "fixed_params": params},
        user_attrs={RETRY_ATTR: trial.number} | ({NAME_ATTR: name} if name else {}),
    )


def _close(study: optuna.Study) -> None:
    backend = getattr(study._storage, "_backend", study._storage)
    if isinstance(backend, optuna.storages.RDBStorage):
        backend.remove_session()
        backend.engine.dispose()


if __name__ == "__main__":
    run_command(main)
