"""The trials of one sweep in the order in which they are trained: study on one side, slots on the other.

ask -> waiting -> running -> (evaluated, perhaps pruned) -> done -> tell. A trial waits while another one in
flight trains steps that it can fork (`sweeps.stages`), or has its very settings; where trials share steps,
the shortest goes first. The study and the trial directories say between them what is done: a RUNNING trial
with a result is told, one without goes on under its number, a failed one is queued again by each start.
"""

import contextlib
import json
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.samplers import GridSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from sweeps.asked import STOPPED_BY_REQUEST, AskedFor
from sweeps.directory import continue_files, copy_known
from sweeps.leaders import Leaders
from sweeps.ledger import METRIC, StepCount, read_metrics, read_sweep, read_trial
from sweeps.one_factor import NAME_ATTR, OneFactorSampler
from sweeps.pruning import Pruning
from sweeps.shared import SharedStudy
from sweeps.spec import SweepDefinition
from sweeps.stages import Sharing, branch_points, planned_steps
from sweeps.study import build_sampler, planned_points, search_space
from sweeps.terminal import first_line, params_text
from sweeps.waiting import (
    CONTINUES_ATTR,
    ORIGIN_ATTR,
    REQUEST_ATTR,
    RETRY_ATTR,
    SEED_ATTR,
    SEED_OF_ATTR,
    continuation,
    continued,
    further_seed,
    is_combination,
    is_further_seed,
    retry,
    seeds_of,
)
from training.config import TrialConfig
from training.exceptions import LoraloomError, SweepError
from training.job import Job, Outcome, Trials
from training.paths import SweepPaths, read_json
from training.progress import Display, duration
from training.tracking import new_run_id

MAX_FAILURES_IN_A_ROW = 3
WINDOW = 64
"""Most trials asked for before their turn, where none depends on results; more if none can begin yet."""
MOST_BLOCKED = 4
"""Most trials that wait for others where results decide what is asked for, or whether anything still is."""


@dataclass(kw_only=True)
class TrialQueue(Trials):
    """All that one start of a sweep decides.

    Args:
        definition: the sweep.
        paths: its directory.
        study: its Optuna study, which nobody else writes unless it is shared.
        shared: what runners of a shared study keep from each other.
        num_trials: trials in all, retries and further seeds not counted; None if the sampler says.
        is_capped: whether that number is the user's, and not the design's.
        num_seeds: seeds that each setting is trained with; the sampler sees the mean.
        shares_stages: whether the engine can fork trials.
        console: where to print.
        display: the terminal's view of what trains.
    """

    definition: SweepDefinition
    paths: SweepPaths
    study: optuna.Study
    shared: SharedStudy | None = None
    num_trials: int | None
    is_capped: bool = False
    num_seeds: int = 1
    shares_stages: bool = True
    console: Console
    display: Display
    closed: bool = False
    """No more trials begin: the time is up."""
    has_nothing: bool = False
    """No trial can begin until something changes: a pack asks at every step."""
    unfinished: list[FrozenTrial] = field(default_factory=list)
    """Trials of an earlier start that have no result yet."""
    waiting: list[Job] = field(default_factory=list)
    """Asked for, and not begun."""
    running: dict[int, Job] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    """Settings -> number of the finished trial that has them; read once, for a sweep may have thousands."""
    late: list[FrozenTrial] = field(default_factory=list)
    """Failed combinations: repeated when all others have ended, on which they depend."""
    failures: list[str] = field(default_factory=list)
    """Causes of the trials that failed since the last one that did not."""
    sharing: Sharing = field(init=False)
    started: float = field(default_factory=time.monotonic)
    steps: StepCount = field(default_factory=StepCount)
    """Of the trials that have ended."""
    num_trained_before: int = 0
    """Steps that earlier starts have trained."""

    def __post_init__(self) -> None:
        self.space = search_space(self.definition)
        self.planned = planned_points(self.study, self.definition)
        self.sharing = Sharing.of(self.paths)
        self.pruning = Pruning(self.study, self.paths)
        self.leaders = Leaders(self.paths)
        self.asked = AskedFor(self.study, self.paths, self.alone())
        with self.alone():
            self.wandb_id = self.study.user_attrs.get("wandb_id")
            if self.wandb_id is None:  # a trial keeps its W&B run over all starts of its sweep
                self.wandb_id = new_run_id()
                self.study.set_user_attr("wandb_id", self.wandb_id)
        planned = [self.definition.trial_config(point) for point in self.planned or []]
        self.planned_steps = planned_steps(self.space, planned, self.shares_stages)
        sampler = self.study.sampler
        self.is_adaptive = not isinstance(sampler, GridSampler | RandomSampler | OneFactorSampler)

    def resume(self) -> None:
        """Settles what an earlier start has left, and queues its failed trials again."""
        with self.alone():
            self._resume()

    def _resume(self) -> None:
        for trial in read_sweep(self.paths.root).all_trials:
            if not trial.result:
                continue
            self.steps.add(trial.result, trial.settings["max_steps"])
            self._learn(trial.number, trial.settings, trial.result)
        self.num_trained_before = self.steps.trained
        failed = self._failed()
        mine = [] if self.shared else self.study.get_trials(states=[TrialState.RUNNING])
        for frozen in mine:
            if not self.paths.trial(frozen.number).result.is_file():
                self.unfinished.append(frozen)
            else:
                self._settle(frozen.number)
        # What has been saved first, or others train its steps again.
        self.unfinished.sort(key=lambda f: not self.paths.trial(f.number).state.is_dir())
        num_done = self.num_counted(finished_only=True)
        if num_done:
            self.console.print(f"{num_done} of {self.num_trials or '?'} trials are already there")
        for frozen in failed:
            if is_combination(frozen):
                self.late.append(frozen)
            else:
                self.study.add_trial(retry(frozen))

    # What a pack asks and tells

    def next_job(self) -> Job | None:
        """The next trial to train; None where there is none before one that is running has ended."""
        with self.alone():
            self._look_outside()
            return self._next_job()

    def _next_job(self) -> Job | None:
        while not (self.closed or self.has_nothing):
            self._look_ahead()
            job = self._take_ready()
            if job is None:
                self.has_nothing = True
                return None
            if self._takes_known(job):
                continue
            number = job.number
            self.running[number] = job
            self.sharing.began(number, job)
            self._print_start(job)
            return job
        return None

    def began(self, job: Job, step: int) -> str | None:
        """A trial that begins with a stage has that one's evaluations behind it."""
        # Stages that it has passed and not stored are worth no waiting.
        self.sharing.passed(job.number, step)
        self.has_nothing = False
        if not step or is_further_seed(job.info) or self._is_taken(job):
            return None
        metrics = read_metrics(job.paths.metrics)
        return self.pruning.forked(self._trial(job.number), job.config, metrics)

    def evaluated(self, job: Job, step: int, loss: float) -> str | None:
        if self.asked.take():
            self.has_nothing = False
        if job.number in self.asked.stopped:
            return STOPPED_BY_REQUEST
        if self._is_taken(job):
            return "other processes have given it up"
        if is_further_seed(job.info):
            return None  # it is there to measure spread
        return self.pruning.decide(self._trial(job.number), job.config, step, loss)

    def leads(self, job: Job, step: int, loss: float) -> bool:
        return self.leaders.takes_lead(step, loss)

    def stored(self, job: Job, step: int) -> None:
        self.sharing.stored_by(job.number, job, step)
        self.has_nothing = False

    def done(self, job: Job, outcome: Outcome) -> None:
        with self.alone():
            if self._is_taken(job):
                self._left(job.number)
                self.console.print(
                    f"{job.label} {job.name}: was given up by the other processes, which had not heard of "
                    "this one for too long; another trial takes its place"
                )
                return
            self._done(job, outcome)

    def _done(self, job: Job, outcome: Outcome) -> None:
        number, label = job.number, f"{job.label} {job.name}"
        self._left(number)
        if number in self.asked.stopped:
            self.asked.take(again=True)
        if isinstance(outcome, Exception):
            self._tell(number, {"state": "failed"})
            if is_further_seed(job.info):
                self._settle(number)  # the others have waited for it
            if isinstance(outcome, LoraloomError):
                raise outcome  # wrong data, model or settings: the next trial would meet it, too
            self._count_failure(label, f"{type(outcome).__name__}: {first_line(outcome)}")
        else:
            self._learn(number, job.config.to_dict(), outcome)
            self._settle(number)
            self._finish(label, outcome, job.config)

    def _is_taken(self, job: Job) -> bool:
        """Whether another runner of a shared study has thought this one dead, and taken the trial."""
        return self.shared is not None and not self.shared.keeps(job.number)

    def requeue(self, job: Job) -> None:
        """A trial whose process has died: the next free slot goes on from its last saved state."""
        if job.paths.result.is_file():
            self.done(job, read_json(job.paths.result))  # it had ended, but nobody was told
            return
        self._left(job.number)
        if self.shared:
            self.shared.hold(job.number)
        self.waiting.insert(0, job)

    def _left(self, number: int) -> None:
        """The trial is in no slot any more."""
        self.running.pop(number, None)
        self.sharing.ended(number)
        if self.shared:
            self.shared.release(number)
        self.has_nothing = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight; with no job to be had either, the sweep has ended."""
        return not self.running and not (self.shared and self.shared.others_train())

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """While it lasts no other runner of a shared study decides anything."""
        return self.shared.lock if self.shared else contextlib.nullcontext()

    def _look_outside(self) -> None:
        """Takes what others ask for, and the trials of runners of a shared study that are gone."""
        if self.asked.take():
            self.has_nothing = False
        if not self.shared or not self.shared.is_due():
            return
        self.has_nothing = False  # others may have ended what trials here wait for
        for lost in self.shared.lost():
            result = self.paths.trial(lost.number).result
            if result.is_file():  # it had ended, but nobody was told
                self._settle(lost.number)
                continue
            self._continue_elsewhere(lost)
            self.console.print(
                f"trial {lost.number}: its process is gone, so it goes on as another"
            )

    def give_back(self) -> None:
        """Lets other runners of a shared study go on with what this one has not ended."""
        if not self.shared:
            return
        with self.alone():
            for number in self.shared.held:
                if self.paths.trial(number).result.is_file():  # it had ended, but nobody was told
                    self.shared.release(number)
                    self._settle(number)
                else:
                    self._continue_elsewhere(self.study.get_trials(deepcopy=False)[number])

    def _continue_elsewhere(self, trial: FrozenTrial) -> None:
        assert self.shared is not None
        trials = self.study.get_trials(deepcopy=False)
        if not any(other.user_attrs.get(CONTINUES_ATTR) == trial.number for other in trials):
            self.study.add_trial(continuation(trial))  # before the next lines: it must not get lost
        self.shared.release(trial.number)
        if self.shared.keeps(trial.number):
            self._tell(trial.number, {"state": "failed"})

    # Asking

    def _look_ahead(self) -> None:
        """Asks for trials until one can begin, or as many as make the order a good one."""
        ready = any(self._is_ready(job) for job in self.waiting)
        while not self._looks_far_enough(ready):
            job = self._ask()
            if job is None:
                return
            self.waiting.append(job)
            ready = ready or self._is_ready(job)

    def _looks_far_enough(self, ready: bool) -> bool:
        # What runners of a shared study take early, the others cannot have.
        if self.is_adaptive or self.shared or self.definition.target is not None:
            return ready or (len(self.waiting) >= MOST_BLOCKED and bool(self.running))
        # What does not depend on results may be asked for at any time: no slot is free for want of it.
        shares = self.shares_stages and any(job.branches for job in self.waiting)
        return ready and (not shares or len(self.waiting) >= WINDOW)

    def _take_ready(self) -> Job | None:
        """Of those that can begin the first; where trials share steps, the shortest.

        In any order each shared step is trained once. Shortest first, all families come to the same steps at
        about the same time, which is when a pruner can compare them: docs/scheduling.md has the numbers.
        """
        ready = [job for job in self.waiting if self._is_ready(job)]
        if not ready:
            return None
        job = ready[0]
        if any(job.branches for job in ready):
            # What an interrupted one has saved of shared steps, another would train again: it goes first.
            job = min(ready, key=lambda job: (not job.paths.state.is_dir(), job.config.max_steps))
        self.waiting.remove(job)
        return job

    def _is_ready(self, job: Job) -> bool:
        has_twin = any(job.config == other.config for other in self.running.values())
        return not has_twin and not self.sharing.is_worth_waiting(job)

    def _ask(self) -> Job | None:
        """The next trial of an earlier start or of the study; None if there is none now."""
        if self.unfinished:
            frozen = self.unfinished.pop(0)
            self._reseed(frozen.number)
            return self._job(self._trial(frozen.number))
        queued = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        if self.late and not (self.running or self.waiting or queued):
            self.study.add_trial(retry(self.late.pop(0)))
        if self._wants_another():
            self._reseed(len(self.study.get_trials(deepcopy=False)))
            return self._job(self.shared.ask() if self.shared else self.study.ask())
        return None

    def _wants_another(self) -> bool:
        if self.study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            return True
        target = self.definition.target
        if target is not None and (self.best() or (0, math.inf))[1] <= target:
            return False
        num_counted = self.num_counted()
        sampler = self.study.sampler
        if isinstance(sampler, OneFactorSampler):
            if num_counted >= (self.num_trials or sampler.num_trials):
                # A retry may have changed what is best: then the combination is tried again, unless
                # the number of trials is the user's.
                idle = not self.running and not self.waiting
                return not self.is_capped and idle and not sampler.is_exhausted(self.study)
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

    def _job(self, trial: optuna.Trial) -> Job:
        """The trial with its settings."""
        # As Study.ask does for its `fixed_distributions`; what was suggested before is kept.
        if self.shared:
            self.shared.hold(trial.number)
        params = {name: trial._suggest(name, dist) for name, dist in self.space.items()}
        attrs = trial.user_attrs
        info = {
            "number": trial.number,
            "name": attrs.get(NAME_ATTR) or params_text(params),
            "params": params,
            "retry_of": attrs.get(RETRY_ATTR),
            "continues": attrs.get(CONTINUES_ATTR),
            "seed_of": attrs.get(SEED_OF_ATTR),
            "sweep": self.definition.name,
            "wandb_id": f"{self.wandb_id}-{attrs.get(ORIGIN_ATTR, trial.number)}",
        }
        try:
            config = self.definition.trial_config(params)
        except LoraloomError:
            self._tell(trial.number, {"state": "failed"})
            raise  # wrong settings: the next trial would meet them, too
        if SEED_ATTR in attrs:
            config = replace(config, seed=attrs[SEED_ATTR])
            info["name"] += f" seed={config.seed}"
        shares, paths = self.shares_stages, self.paths.trial(trial.number)
        if CONTINUES_ATTR in attrs:
            chain = continued(self.study.get_trials(deepcopy=False), trial.number)
            continue_files([self.paths.trial(number) for number in chain], paths)
        return Job(
            config=config,
            paths=paths,
            info=info,
            label=f"trial {trial.number}",
            stages=self.paths.stages if shares else None,
            branches=branch_points(self.space, config) if shares else (),
        )

    def _trial(self, number: int) -> optuna.Trial:
        frozen = self.study.get_trials(deepcopy=False)[number]
        return optuna.trial.Trial(self.study, frozen._trial_id)

    def _failed(self) -> list[FrozenTrial]:
        """The failed trials that none repeats yet."""
        trials = self.study.get_trials(deepcopy=False)
        repeated = {trial.user_attrs.get(RETRY_ATTR) for trial in trials}
        return [
            trial
            for trial in trials
            if trial.state == TrialState.FAIL and trial.number not in repeated
        ]

    def _takes_known(self, job: Job) -> bool:
        """Copies the trial from the one that had exactly these settings, if there is one."""
        number = self.known.get(_key(job.config.to_dict()))
        if number is None:
            return False
        assert job.info is not None
        self._print_start(job)
        known = read_trial(self.paths.trial(number))
        self.done(job, copy_known(known, job.paths, job.config, job.info))
        return True

    def _learn(self, number: int, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """A finished trial need not be trained again, if it is not a copy itself."""
        is_complete = result.get("state") == "complete" and result.get(METRIC) is not None
        if is_complete and "same_as" not in result:
            self.known.setdefault(_key(settings), number)

    # Telling

    def _settle(self, number: int) -> None:
        """Tells the study of a trial with a result; of one with several seeds, when all have ended."""
        group = self._seeds_of(number)
        first = group[0]
        result = read_json(self.paths.trial(first.number).result)
        is_open = not first.state.is_finished() and result.get("state") == "complete"
        if is_open and len(group) < self.num_seeds:
            seed = self._config(first).seed
            for further in range(len(group), self.num_seeds):
                self.study.add_trial(further_seed(first, seed + further))
            return
        results = {}
        for trial in group:
            path = self.paths.trial(trial.number).result
            if not path.is_file():
                return
            results[trial.number] = read_json(path)
        losses = [r[METRIC] for r in results.values() if r.get("state") == "complete"]
        mean = sum(losses) / len(losses) if losses else None
        for trial in group:
            if not trial.state.is_finished():
                self._tell(trial.number, {**results[trial.number], METRIC: mean})

    def _seeds_of(self, number: int) -> list[FrozenTrial]:
        """The trial, or the one whose further seed it is, and all of that one's further seeds."""
        trials = self.study.get_trials(deepcopy=False)
        first = trials[number].user_attrs.get(SEED_OF_ATTR, number)
        return [trials[first], *seeds_of(trials, first)]

    def _config(self, trial: FrozenTrial) -> TrialConfig:
        return self.definition.trial_config({name: trial.params[name] for name in self.space})

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

    def _count_failure(self, label: str, cause: str) -> None:
        self.console.print(f"{label}: failed: {cause}")
        self.failures.append(f"{label}: {cause}")
        if len(self.failures) >= MAX_FAILURES_IN_A_ROW:
            raise SweepError(
                f"{self.paths.root}: {len(self.failures)} trials failed in a row, so the sweep "
                f"stops; the first was {self.failures[0]}"
            )

    def _finish(self, label: str, result: dict[str, Any], config: TrialConfig) -> None:
        loss = result.get(METRIC)
        if result.get("state") == "failed" or loss is None or not math.isfinite(loss):
            self._count_failure(label, result.get("reason") or f"{METRIC} is {loss}")
            return
        self.failures.clear()
        self.steps.add(result, config.max_steps)
        if result["state"] == "pruned":
            self.console.print(f"{label}: pruned: {result['reason']}{self._time_left()}")
            return
        if "same_as" in result:
            taken = f"as in trial {result['same_as']}, which had the same settings"
        else:
            taken = duration(result.get("train_time_s") or 0)
            origin = result.get("forked_from")
            if origin:
                taken += f", its first {origin['step']} steps from trial {int(origin['trial'])}"
        best = self.best()
        shown = f", best so far {best[1]:.4f} (trial {best[0]})" if best else ""
        self.console.print(f"{label}: {METRIC} {loss:.4f}{shown}, {taken}{self._time_left()}")

    # Counting

    def best(self) -> tuple[int, float] | None:
        trials = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        scored = [(trial.value, trial.number) for trial in trials if trial.value is not None]
        return (min(scored)[1], min(scored)[0]) if scored else None

    def num_counted(self, *, finished_only: bool = False) -> int:
        """Trials that count: those that a retry repeats do not, nor further seeds, nor what was asked for."""
        num = 0
        for trial in self.study.get_trials(deepcopy=False):
            attrs = trial.user_attrs
            if SEED_OF_ATTR not in attrs and REQUEST_ATTR not in attrs:
                num += not finished_only or trial.state.is_finished()
                num -= RETRY_ATTR in attrs  # the failed one that it repeats has been counted, too
        return num

    def savings(self) -> str:
        """`44 steps saved by stages, 20 by pruning`, or nothing."""
        parts = [(self.steps.saved, "saved by stages"), (self.steps.pruned, "by pruning")]
        shown = [f"{number:,} {what}" for number, what in parts if number]
        return ", ".join(shown).replace(" ", " steps ", 1) if shown else ""

    def footer(self) -> str:
        """Below the table of trials: what is left of the sweep, and what was saved."""
        return "; ".join(filter(None, [self._time_left().removeprefix(", "), self.savings()]))

    def _print_start(self, job: Job) -> None:
        assert job.info is not None
        params = params_text(job.info["params"])
        shown = "" if job.name == params else f": {params}"
        retry_of = job.info["retry_of"]
        again = f", again for failed trial {retry_of}" if retry_of is not None else ""
        self.console.print(f"{job.label}{self._position()} {job.name}{shown}{again}")

    def _position(self) -> str:
        if self.num_trials is None:
            return ""
        number = self.num_counted(finished_only=True) + len(self.running)
        number = min(max(1, number), max(1, self.num_trials)) if self.running else number + 1
        return f" ({number} of {max(number, self.num_trials)})"

    def _time_left(self) -> str:
        if self.num_trials is None or not self.display.num_steps:
            return ""
        num_left = self.num_trials - self.num_counted(finished_only=True)
        if num_left <= 0:
            return ""
        if self.planned is not None and num_left <= len(self.planned):
            steps_left = self.planned_steps - self.num_trained_before - self.display.num_steps
        else:
            done = [trial.params for trial in self.study.get_trials(deepcopy=False)]
            steps_left = num_left * self._mean_steps(done)
        steps_left -= self.steps.pruned
        pace_s = (time.monotonic() - self.started) / self.display.num_steps
        return f", about {duration(max(0, steps_left) * pace_s)} left"

    def _mean_steps(self, points: list[dict[str, Any]]) -> float:
        default = self.definition.constants.get("max_steps", TrialConfig.max_steps)
        steps = [point.get("max_steps", default) for point in points]
        return sum(steps) / max(1, len(steps))


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
