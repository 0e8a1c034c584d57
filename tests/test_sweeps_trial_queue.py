"""A sweep's schedule, simulated: no step is trained twice, no trial waits for nothing, and each is told once.

Queue and study are the real ones; `benchmarks.simulation` stands in for packs and workers. Sweeps are drawn
at random: spaces, methods, workers, slots, prunings, deaths of workers and of the whole process.
"""

import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from simulated_sweeps import (
    BAYES_OF_ONE_FAMILY,
    Case,
    Queue,
    RandomPruner,
    cases,
    common_steps,
    deaths,
    define,
    directory,
    end,
    prunings,
    simulate,
    tree_size,
)

from benchmarks.scheduling import LongestFirst
from benchmarks.simulation import (
    Disk,
    Landscape,
    SimulatedTrial,
    Simulation,
    make_queue,
    on_idle_device,
    study_in_memory,
    write,
)
from sweeps.ledger import METRIC, read_sweep
from sweeps.stages import planned_steps
from sweeps.study import planned_points, search_space
from sweeps.trial_queue import MOST_BLOCKED, WINDOW, TrialQueue
from training.job import Job, JobOptions, Outcome
from training.pack import run_pack

CASES = settings(max_examples=15, deadline=None)


# No step twice


@CASES
@given(cases())
@example(
    Case(schedules=("constant", "linear"), warmups=(0, 3))
)  # constant has no warmup: all the same
def test_no_step_is_trained_twice(case: Case) -> None:
    with directory() as root:
        done = simulate(root, case)
        assert len(done.trained) == len(set(done.trained)) == tree_size(done.configs)
        if case.method == "grid":
            points = planned_points(done.queue.study, done.definition) or []
            configs = [done.definition.trial_config(point) for point in points]
            assert len(done.trained) == planned_steps(search_space(done.definition), configs)


@CASES
@given(cases(share_pruned=prunings))
def test_no_step_is_trained_twice_whatever_is_pruned(case: Case) -> None:
    with directory() as root:
        done = simulate(root, case)
        # A sampler may ask for the settings of a pruned trial again: those are trained as if they were new.
        num = Counter(repr(config) for config in done.configs)
        allowed = Counter(
            node
            for trial in done.trials
            if trial.state == "pruned" and num[repr(trial.config)] > 1
            for node in done.nodes[trial.number][: trial.result["num_steps"]]
        )
        for node, times in done.times_trained().items():
            assert times <= 1 + allowed[node]


@CASES
@given(cases(deaths=deaths))
@example(BAYES_OF_ONE_FAMILY)
@example(replace(BAYES_OF_ONE_FAMILY, max_steps=(7, 9, 6, 5), slots=2, deaths=((0, 0), (0.53, 1))))
@example(Case(method="random", deaths=((0.7, 1),)))  # the next start knows what has been trained
def test_after_a_death_only_the_steps_since_the_last_saved_one_are_trained_again(
    case: Case,
) -> None:
    with directory() as root:
        done = simulate(root, case)
        allowed = Counter(
            node for number, died, saved in done.lost for node in done.nodes[number][saved:died]
        )
        for node, times in done.times_trained().items():
            assert times <= 1 + allowed[node]
        assert len(done.times_trained()) == tree_size(done.configs)


# No deadlock


@CASES
@given(cases(share_pruned=st.sampled_from([0.0, 0.3]), deaths=st.one_of(st.just(()), deaths)))
def test_every_trial_is_told_exactly_once_and_none_is_left(case: Case) -> None:
    with directory() as root:
        done = simulate(root, case)
        trials = done.queue.study.get_trials(deepcopy=False)
        assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert done.queue.told == Counter(range(len(trials)))
        assert not done.queue.waiting and done.queue.is_idle and not done.queue.sharing.leaders
        if case.method == "grid":
            assert len(trials) == case.size
        elif case.method != "custom":
            assert len(trials) == case.run_cap


# No starvation


def is_blocked(job: Any, simulation: Simulation) -> bool:
    """Whether a trial in flight is on its way to a step that is worth waiting for."""
    stage = simulation.disk.fork(job.config)
    longest = stage.step if stage else 0
    return any(
        job.config == trial.job.config
        or max(trial.step, longest) < common_steps(job.config, trial.job.config)
        for trial in simulation.in_flight
    )


def check_no_slot_is_wasted(simulation: Simulation) -> None:
    queue = simulation.queue
    assert all(is_blocked(job, simulation) for job in queue.waiting)
    asks_late = queue.is_adaptive or queue.definition.target is not None
    num_blocked = MOST_BLOCKED if asks_late else math.inf
    assert len(queue.waiting) >= num_blocked or not queue._wants_another()


@CASES
@given(cases(share_pruned=st.sampled_from([0.0, 0.3]), deaths=st.one_of(st.just(()), deaths)))
def test_a_slot_is_free_only_while_all_that_wait_wait_for_one_in_flight(case: Case) -> None:
    with directory() as root:
        simulate(root, case, watch=check_no_slot_is_wasted)


def test_a_slot_is_not_free_because_many_that_wait_were_asked_for_first(tmp_path: Path) -> None:
    steps = tuple(range(10, 20 + WINDOW))
    case = Case(method="custom", max_steps=steps, schedules=("constant",), rates=(1e-4, 2e-4, 3e-4))
    simulate(tmp_path / "x", case, watch=check_no_slot_is_wasted)


@pytest.mark.parametrize("branch", [6, 20])
def test_a_trial_that_has_passed_a_missing_stage_keeps_nobody_waiting(
    tmp_path: Path, branch: int
) -> None:
    case = Case(max_steps=(branch, 60), schedules=("constant",), eval_steps=10)
    definition = define(tmp_path, case.text)
    study, disk = study_in_memory(definition), Disk()
    # The longer one is to be the one in flight, as it may be where a sampler or a retry makes the order.
    queue = make_queue(definition, tmp_path / "runs", study=study, kind=LongestFirst)
    Simulation(queue=queue, slots=1, disk=disk).run(until=25)
    shutil.rmtree(queue.paths.stages)  # as `python -m sweeps.stages --delete` does
    disk.stages.clear()
    queue = make_queue(definition, tmp_path / "runs", study=study)
    queue.resume()
    simulation = Simulation(queue=queue, slots=2, disk=disk, step_time=on_idle_device)
    assert [trial.step for trial in simulation.run(until=0).in_flight] == [20, 0]


def test_a_target_that_is_reached_lets_few_more_trials_begin(tmp_path: Path) -> None:
    case = Case(max_steps=tuple(range(4, 60)), schedules=("constant",), target=9.0, slots=2)
    done = simulate(tmp_path / "x", case, watch=check_no_slot_is_wasted)
    assert 1 <= len(done.trials) <= case.slots + MOST_BLOCKED


def test_of_trials_that_share_steps_the_shortest_goes_first(tmp_path: Path) -> None:
    done = simulate(tmp_path / "x", Case(rates=(1e-4, 3e-4), slots=1))
    configs = {trial.number: trial.config for trial in done.trials}
    order = [configs[number].max_steps for number in dict.fromkeys(n for n, _ in done.trained)]
    assert order == [6, 6, 12, 12, 20, 20]


def test_trials_that_share_nothing_go_in_the_samplers_order(tmp_path: Path) -> None:
    done = simulate(tmp_path / "x", Case(schedules=("linear",), ranks=(8, 16), slots=1))
    assert list(dict.fromkeys(number for number, _ in done.trained)) == list(range(6))


# Exactness


@CASES
@given(cases(share_pruned=st.sampled_from([0.0, 0.3]), deaths=st.one_of(st.just(()), deaths)))
def test_a_forked_trial_has_the_history_of_one_that_trained_alone(case: Case) -> None:
    with directory() as root:
        for trial in simulate(root, case).trials:
            alone = SimulatedTrial.alone(trial.config, Landscape()).evals
            evals = [(line["step"], line[METRIC]) for line in trial.metrics()]
            assert evals == (alone if trial.state == "complete" else alone[: len(evals)])


def test_the_simulated_pack_tells_the_queue_what_a_real_one_does(
    tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    varied = {"max_steps": [4, 8, 10], "lora_r": [2, 4], "eval_steps": [3]}
    parameters = {name: {"values": values} for name, values in varied.items()}
    constants = {**tiny_settings, "lr_scheduler_type": "warmup_stable_decay"}
    parameters |= {n: {"value": v} for n, v in constants.items() if n not in varied}
    text = yaml.safe_dump({"method": "grid", "parameters": parameters})
    calls = []
    for name in ("simulated", "real"):
        definition = define(tmp_path, text)
        study = study_in_memory(definition)
        study.pruner = RandomPruner(0.25, seed=2)
        queue = make_queue(definition, tmp_path / name, kind=TranscribedQueue, study=study)
        if name == "real":
            run_pack(queue, JobOptions(slots=2, report_to="none", display=queue.display))
        else:
            Simulation(queue=queue, slots=2).run()
        assert isinstance(queue, TranscribedQueue)
        calls.append(queue.calls)
    assert calls[0] == calls[1]
    kinds = Counter(call[0] for call in calls[0])
    assert kinds["stored"] and any(call[0] == "began" and call[2] for call in calls[0])
    assert any(call[0] == "done" and call[2] == "pruned" for call in calls[0])


@dataclass(kw_only=True)
class TranscribedQueue(TrialQueue):
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def began(self, job: Job, step: int) -> str | None:
        reason = super().began(job, step)
        self.calls.append(("began", job.label, step, reason is None))
        return reason

    def evaluated(self, job: Job, step: int, loss: float) -> str | None:
        reason = super().evaluated(job, step, loss)
        self.calls.append(("evaluated", job.label, step, reason is None))
        return reason

    def stored(self, job: Job, step: int) -> None:
        super().stored(job, step)
        self.calls.append(("stored", job.label, step))

    def done(self, job: Job, outcome: Outcome) -> None:
        super().done(job, outcome)
        assert isinstance(outcome, dict)
        facts = [outcome[name] for name in ("state", "num_steps", "steps_saved")]
        self.calls.append(("done", job.label, *facts))


# Deaths at the worst moments


def test_a_trial_whose_worker_dies_before_it_tells_the_end_is_not_trained_again(
    tmp_path: Path,
) -> None:
    definition = define(tmp_path, Case(max_steps=(6,), ranks=(8, 16)).text)
    queue = make_queue(definition, tmp_path / "runs", kind=Queue)
    job = queue.next_job()
    assert job is not None
    end(job, 2.5)
    queue.requeue(job)
    simulation = Simulation(queue=queue).run()
    assert {number for number, _ in simulation.trained} == {1}
    first = read_sweep(tmp_path / "runs").trial(0)
    assert queue.study.trials[0].value == first.loss == 2.5 and "same_as" not in first.result
    assert queue.steps.saved == 0


def test_trials_of_a_dead_worker_that_share_nothing_keep_their_order(tmp_path: Path) -> None:
    definition = define(tmp_path, Case(schedules=("linear",), max_steps=(20, 6, 12)).text)
    queue = make_queue(definition, tmp_path / "runs")
    jobs = [queue.next_job() for _ in range(3)]
    assert [job.config.max_steps for job in jobs if job] != [6, 12, 20]
    for job in reversed(jobs):
        assert job is not None
        queue.requeue(job)
    assert [queue.next_job() for _ in range(3)] == jobs


def test_a_copy_is_not_copied_again(tmp_path: Path) -> None:
    case = Case(method="random", max_steps=(6,), run_cap=3)
    definition = define(tmp_path, case.text)
    study = study_in_memory(definition)
    queue = make_queue(definition, tmp_path / "runs", study=study)
    first = queue.next_job()
    assert first is not None
    queue.study.ask()  # of the same settings, and trained by an earlier start
    second = replace(first, paths=queue.paths.trial(1), info={**(first.info or {}), "number": 1})
    end(second, 2.5)
    write(first.paths.result, {**end(first, 2.5), "same_as": 1, "steps_saved": 6})
    queue = make_queue(definition, tmp_path / "runs", study=study)
    queue.resume()
    assert queue.next_job() is None
    assert read_sweep(tmp_path / "runs").trial(2).result["same_as"] == 1


def test_followers_of_a_trial_that_fails_begin_at_once(tmp_path: Path) -> None:
    definition = define(tmp_path, Case().text)
    queue = make_queue(definition, tmp_path / "runs")
    leader = queue.next_job()
    assert leader is not None and leader.config.max_steps == 6
    assert queue.next_job() is None
    queue.done(leader, ValueError("out of luck"))
    follower = queue.next_job()
    assert follower is not None and follower.config.max_steps == 12


# Size


@pytest.mark.slow
def test_a_sweep_of_two_thousand_trials_is_scheduled_in_seconds(tmp_path: Path) -> None:
    case = Case(
        method="random",
        run_cap=2000,
        max_steps=(4, 6),
        schedules=("constant",),
        rates=tuple(number * 1e-5 for number in range(1, 33)),
        ranks=tuple(range(1, 65)),
        slots=4,
    )
    started = time.process_time()
    with directory() as root:
        done = simulate(root, case)
    assert len(done.queue.told) == 2000
    assert len(done.trained) == tree_size(done.configs)
    # About 10 s; reading all trials again for each would take minutes.
    assert time.process_time() - started < 60


STUDY = Case(
    max_steps=(60, 300, 500, 1000),
    warmups=(5,),
    rates=(1e-4, 2e-4, 5e-4),
    ranks=(8, 16, 32),
    eval_steps=500,
    slots=8,
)


@pytest.mark.parametrize(
    ("method", "num_trials", "alone", "shared"),
    [("custom", 9, 4860, 4169), ("grid", 36, 16740, 10521)],
)
def test_the_original_study_with_shared_steps(
    tmp_path: Path, method: str, num_trials: int, alone: int, shared: int
) -> None:
    done = simulate(tmp_path / "x", replace(STUDY, method=method))
    assert len(done.trials) == num_trials
    assert sum(config.max_steps for config in done.configs) == alone
    assert len(done.trained) == tree_size(done.configs) == shared
    assert done.queue.planned_steps == shared


def test_the_combination_of_the_original_study_shares_nothing(tmp_path: Path) -> None:
    done = simulate(tmp_path / "x", replace(STUDY, method="custom"))
    combination = done.trials[-1]
    assert combination.name == "combination" and combination.config.max_steps == 1000
    assert combination.result["steps_saved"] == 0
