"""Several seeds of one setting, over a study on disk: what the sampler is told, and the final round."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState
from simulated_sweeps import Case, Queue, define, directory, end

from benchmarks.simulation import Disk, Simulation, make_queue, write
from sweeps.ledger import read_sweep
from sweeps.seeds import queue_final_round
from sweeps.study import open_study
from sweeps.waiting import SEED_OF_ATTR, further_seed
from training.paths import SweepPaths


@pytest.fixture
def root() -> Iterator[Path]:
    """SQLite waits for the disk at each write, so not on one where that can be had."""
    with directory() as path:
        yield path


SEEDS = Case(max_steps=(4, 8), rates=(1e-4, 3e-4), eval_steps=2)
ONE_POINT = Case(max_steps=(4,), eval_steps=2)


def start(root: Path, case: Case, **options: Any) -> Queue:
    """The sweep's queue as a new process has it."""
    definition = define(root, case.text)
    paths = SweepPaths(root / "runs")
    paths.root.mkdir(exist_ok=True)
    study = open_study(definition, paths)
    queue = make_queue(definition, paths.root, kind=Queue, study=study, **options)
    queue.resume()
    assert isinstance(queue, Queue)
    return queue


def losses_of_seeds(root: Path) -> dict[int, list[float]]:
    """Losses of all seeds that have ended, by the first one's number."""
    losses: dict[int, list[float]] = {}
    for trial in read_sweep(root / "runs").finished:
        assert trial.loss is not None
        first = trial.number if trial.seed_of is None else trial.seed_of
        losses.setdefault(first, []).append(trial.loss)
    return losses


def check_told(root: Path, study: optuna.Study, num_seeds: int) -> None:
    """What the study has been told is the mean over all seeds, and nothing before."""
    losses = losses_of_seeds(root)
    for trial in study.trials:
        group = losses.get(trial.user_attrs.get(SEED_OF_ATTR, trial.number), [])
        if trial.state == TrialState.COMPLETE:
            assert len(set(group)) == num_seeds
            assert trial.value == pytest.approx(sum(group) / num_seeds, abs=1e-12)
        else:
            assert len(group) < num_seeds


@pytest.mark.parametrize("stop", [math.inf, 9, 31])
def test_the_sampler_is_told_the_mean_once_all_seeds_have_ended(root: Path, stop: float) -> None:
    disk = Disk()
    queue = start(root, SEEDS, num_seeds=3)
    Simulation(queue=queue, disk=disk).run(until=stop)
    check_told(root, queue.study, 3)
    queue = start(root, SEEDS, num_seeds=3, told=queue.told)
    Simulation(queue=queue, disk=disk).run()
    check_told(root, queue.study, 3)
    assert {trial.state for trial in queue.study.trials} == {TrialState.COMPLETE}
    assert queue.told == Counter(range(4 * 3))
    seeds = Counter(trial.config.seed for trial in read_sweep(root / "runs").finished)
    assert seeds == {42: 4, 43: 4, 44: 4}


def test_further_seeds_do_not_count_as_trials(root: Path) -> None:
    case = Case(method="random", max_steps=(4,), rates=(1e-4, 2e-4, 3e-4, 4e-4), run_cap=4, slots=1)
    queue = start(root, case, num_seeds=2)
    Simulation(queue=queue, slots=1).run()
    assert [trial.user_attrs.get(SEED_OF_ATTR) for trial in queue.study.trials] == [
        None, 0, None, 2, None, 4, None, 6,
    ]  # fmt: skip


def test_a_sweep_killed_while_it_queues_seeds_queues_the_rest(root: Path) -> None:
    queue = start(root, ONE_POINT, num_seeds=3)
    job = queue.next_job()
    assert job is not None
    end(job, 2.5)
    queue.study.add_trial(further_seed(queue.study.trials[0], 43))  # and then it was killed
    queue = start(root, ONE_POINT, num_seeds=3)
    Simulation(queue=queue).run()
    check_told(root, queue.study, 3)
    assert [t.config.seed for t in read_sweep(root / "runs").finished] == [42, 43, 44]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_seed_that_fails_leaves_the_mean_of_the_others_and_is_tried_again(
    root: Path, failing: int
) -> None:
    queue = start(root, ONE_POINT, num_seeds=3)
    losses = iter([2.0, 3.0])
    for number in range(3):
        job = queue.next_job()
        assert job is not None
        if number != failing:
            queue.done(job, end(job, next(losses)))
            continue
        write(job.paths.config, {"settings": job.config.to_dict(), **(job.info or {})})
        write(job.paths.result, {"state": "failed"})
        queue.done(job, ValueError("out of luck"))
    values = [(trial.state, trial.value) for trial in queue.study.trials]
    assert values.pop(failing) == (TrialState.FAIL, None)
    assert values == [(TrialState.COMPLETE, 2.5)] * 2
    queue = start(root, ONE_POINT, num_seeds=3)
    Simulation(queue=queue).run()
    again = read_sweep(root / "runs").trial(3)
    assert (again.retry_of, again.seed_of, again.config.seed) == (failing, 0, 42 + failing)
    states = Counter(trial.state for trial in queue.study.trials)
    assert states == {TrialState.COMPLETE: 3, TrialState.FAIL: 1}


def write_examples(root: Path) -> None:
    """Per-example losses of every finished trial, which scatter much more than ranks differ."""
    for trial in read_sweep(root / "runs").finished:
        spread = np.random.default_rng(trial.number).normal(0, 0.2, 24)
        assert trial.loss is not None
        losses = trial.loss + spread - spread.mean()
        path = trial.paths.eval_losses(trial.result["best_step"])
        path.parent.mkdir(exist_ok=True)
        ids = [f"e{number}" for number in range(24)]
        table = {"example_id": ids, "loss_sum": losses * 4, "num_tokens": np.full(24, 4)}
        pd.DataFrame(table).to_parquet(path)


FINAL = Case(max_steps=(8,), rates=(1e-4, 5e-3), ranks=(8, 16), eval_steps=2)
"""The two of the lower rate are far ahead of the others, and about equal."""


@pytest.mark.parametrize(("num_seeds", "fresh"), [(1, [43, 44]), (2, [44, 45])])
def test_the_final_round_trains_the_best_and_its_equals_on_fresh_seeds(
    root: Path, num_seeds: int, fresh: list[int]
) -> None:
    queue = start(root, FINAL, num_seeds=num_seeds)
    Simulation(queue=queue).run()
    write_examples(root)
    assert queue_final_round(queue, 2) == 4
    simulation = Simulation(queue=queue).run()
    assert len(simulation.trained) == 4 * 8
    record = read_sweep(root / "runs")
    seeds: dict[int, list[int]] = {}
    for trial in record.all_trials[4 * num_seeds :]:
        assert trial.seed_of is not None
        seeds.setdefault(trial.seed_of, []).append(trial.config.seed)
        losses = record.seed_losses(record.trial(trial.seed_of))
        assert len(losses) == num_seeds + 2
        told = queue.study.trials[trial.number].value
        assert told == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    assert sorted(seeds.values()) == [fresh, fresh]
    assert {record.trial(number).config.learning_rate for number in seeds} == {1e-4}
    assert queue_final_round(queue, 2) == 0


@pytest.mark.parametrize("stop", [0, 5, 20])
def test_a_final_round_that_is_killed_goes_on_with_the_same_trials(root: Path, stop: int) -> None:
    disk = Disk()
    queue = start(root, FINAL)
    Simulation(queue=queue, disk=disk).run()
    write_examples(root)
    assert queue_final_round(queue, 2) == 4
    Simulation(queue=queue, disk=disk).run(until=stop)
    queue = start(root, FINAL, told=queue.told)
    Simulation(queue=queue, disk=disk).run()
    assert queue_final_round(queue, 2) == 0
    assert queue.told == Counter(range(8))
    seeds = Counter(trial.seed_of for trial in read_sweep(root / "runs").finished)
    assert sorted(seeds.values()) == [2, 2, 4]


def test_a_better_trial_joins_the_final_round_when_it_is_over(root: Path) -> None:
    queue = start(root, FINAL)
    Simulation(queue=queue).run()
    write_examples(root)
    assert queue_final_round(queue, 2) == 4
    leaders = queue.study.user_attrs["final_round"]
    others = [trial for trial in read_sweep(root / "runs").trials if trial.number not in leaders]
    write(others[0].paths.result, {**others[0].result, "eval/loss": 0.5})
    write_examples(root)
    assert queue_final_round(queue, 2) == 4
    Simulation(queue=queue).run()
    assert queue_final_round(queue, 2) == 2
    assert queue.study.user_attrs["final_round"] == [*leaders, others[0].number]


def test_a_final_round_without_a_finished_trial_has_nobody(root: Path) -> None:
    queue = start(root, FINAL)
    assert queue_final_round(queue, 2) == 0
    assert not queue.study.trials
