"""What is asked of a sweep from outside: refused in one line, or done by the runner, once."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from benchmarks.simulation import make_queue, study_in_memory
from sweeps.asked import STOPPED_BY_REQUEST
from sweeps.ledger import METRIC, read_sweep
from sweeps.requests import (
    add_seeds,
    is_running,
    pending_requests,
    queue_setting,
    settle_request,
    stop_trial,
)
from sweeps.spec import read_definition
from sweeps.trial_queue import TrialQueue
from sweeps.waiting import REQUEST_ATTR, SEED_ATTR, SEED_OF_ATTR
from training.exceptions import LoraloomError
from training.job import Job
from training.paths import SweepPaths, write_json

LIST = {"method": "grid", "parameters": {"lora_r": {"values": [4, 8]}, "max_steps": {"value": 8}}}
RANGE: dict[str, Any] = {
    "method": "random",
    "run_cap": 2,
    "parameters": {"learning_rate": {"min": 1e-4, "max": 1e-3}, "lora_r": {"values": [4, 8]}},
}


def make(
    root: Path, config: dict[str, Any] = LIST, study: optuna.Study | None = None
) -> TrialQueue:
    paths = SweepPaths(root)
    paths.root.mkdir(exist_ok=True)
    paths.definition.write_text(yaml.safe_dump(config))
    definition = read_definition(paths.definition)
    return make_queue(definition, paths.root, study=study)


def begin(queue: TrialQueue) -> Job:
    job = queue.next_job()
    assert job is not None
    write_json(job.paths.config, {"settings": job.config.to_dict(), **(job.info or {})})
    return job


def end(queue: TrialQueue, job: Job, loss: float = 2.0, state: str = "complete") -> None:
    result = {"state": state, METRIC: loss, "num_steps": 8, "reason": ""}
    write_json(job.paths.result, result)
    queue.done(job, result)


def run_all(queue: TrialQueue) -> list[Job]:
    jobs = []
    while (job := queue.next_job()) is not None:
        write_json(job.paths.config, {"settings": job.config.to_dict(), **(job.info or {})})
        end(queue, job)
        jobs.append(job)
    return jobs


def test_a_trial_that_is_to_stop_ends_at_its_next_evaluation_and_no_other(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    first, second = begin(queue), begin(queue)
    assert queue.evaluated(first, 2, 3.0) is None
    stop_trial(queue.paths, first.number)
    assert queue.evaluated(second, 2, 3.0) is None
    assert queue.evaluated(first, 4, 2.9) == STOPPED_BY_REQUEST
    assert (
        len(pending_requests(queue.paths)) == 1
    )  # until the trial has ended: a crash forgets nothing
    end(queue, first, state="pruned")
    assert pending_requests(queue.paths) == []
    assert queue.study.trials[first.number].state == TrialState.PRUNED


def test_a_stop_outlives_the_runner(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    job = begin(queue)
    stop_trial(queue.paths, job.number)
    again = make(tmp_path / "s", study=queue.study)
    again.resume()
    job = begin(again)
    assert again.evaluated(job, 2, 3.0) == STOPPED_BY_REQUEST


def test_seeds_are_added_to_a_finished_sweep_once(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    jobs = run_all(queue)
    add_seeds(queue.paths, [jobs[0].number], 2)
    more = run_all(queue)
    assert [job.config.seed - jobs[0].config.seed for job in more] == [1, 2]
    assert {job.config.lora_r for job in more} == {jobs[0].config.lora_r}
    assert pending_requests(queue.paths) == []
    assert queue.num_counted() == 2  # the sweep's own number of trials is what it was
    add_seeds(queue.paths, [more[0].number], 1)  # a seed stands for its setting
    assert [job.config.seed - jobs[0].config.seed for job in run_all(queue)] == [3]


def test_a_start_killed_while_it_queues_seeds_queues_the_rest(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    jobs = run_all(queue)
    add_seeds(queue.paths, [jobs[0].number], 3)
    (request,) = pending_requests(queue.paths)
    assert queue.asked._is_settled(request)
    # ... and then it was killed: the request is still there, and two of its trials.
    study = study_in_memory(queue.definition)
    study.add_trials(queue.study.trials[:-1])
    again = make(tmp_path / "s", study=study)
    again.asked.take()
    seeds = [t.user_attrs[SEED_ATTR] for t in study.trials if SEED_OF_ATTR in t.user_attrs]
    assert seeds == [jobs[0].config.seed + further for further in (1, 2, 3)]
    assert pending_requests(again.paths) == []


def test_a_setting_is_trained_next_and_counts_besides(tmp_path: Path) -> None:
    queue = make(tmp_path / "s", RANGE)
    begin(queue)
    queue_setting(queue.paths, {"learning_rate": "5e-4", "lora_r": "8"})
    job = begin(queue)
    assert (job.config.learning_rate, job.config.lora_r) == (5e-4, 8)
    assert queue.num_counted() == 1
    assert REQUEST_ATTR in queue.study.trials[job.number].user_attrs


def test_a_point_of_the_grid_that_was_asked_for_is_trained_once(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    queue_setting(queue.paths, {"lora_r": 8})
    ranks = [job.config.lora_r for job in run_all(queue)]
    assert ranks == [8, 4]
    assert len(read_sweep(queue.paths.root).all_trials) == 2


def test_a_list_is_a_setting_as_it_stands_in_the_definition(tmp_path: Path) -> None:
    modules = [["q_proj"], ["q_proj", "v_proj"]]
    config = {"method": "grid", "parameters": {"lora_target_modules": {"values": modules}}}
    queue = make(tmp_path / "s", config)
    queue_setting(queue.paths, {"lora_target_modules": json.dumps(modules[1])})
    assert list(begin(queue).config.lora_target_modules) == modules[1]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"learning_rate": 5e-4}, "lora_r is missing"),
        ({"learning_rate": 5e-4, "lora_r": 16}, "lora_r is 16, but must be one of 4, 8"),
        ({"learning_rate": 0.1, "lora_r": 8}, "learning_rate is 0.1, but must be from 0.0001 to"),
        ({"learning_rate": "fast", "lora_r": 8}, "learning_rate is 'fast', but must be"),
        ({"learning_rate": 5e-4, "lora_r": 8, "seed": 1}, "seed is not varied by this sweep"),
    ],
)
def test_a_setting_outside_the_search_space_is_refused(
    tmp_path: Path, params: dict[str, Any], message: str
) -> None:
    queue = make(tmp_path / "s", RANGE)
    with pytest.raises(LoraloomError) as error:
        queue_setting(queue.paths, params)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert pending_requests(queue.paths) == []


def test_what_can_never_be_done_is_refused(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    job, running = begin(queue), begin(queue)
    end(queue, job)
    for ask, message in [
        (lambda: stop_trial(queue.paths, 77), "0077: no such trial"),
        (lambda: stop_trial(queue.paths, job.number), "the trial is complete already"),
        (lambda: add_seeds(queue.paths, [running.number], 1), "is running, but must be complete"),
        (lambda: add_seeds(queue.paths, [job.number], 0), "num_seeds is 0, but must be from 1"),
    ]:
        with pytest.raises(LoraloomError, match=message):
            ask()
    assert pending_requests(queue.paths) == []


def test_a_request_that_is_no_json_is_nobodys(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    queue_setting(queue.paths, {"lora_r": 4})
    (queue.paths.requests / "1.json").write_text("{")
    (request,) = pending_requests(queue.paths)
    settle_request(queue.paths, request)
    assert pending_requests(queue.paths) == []


def test_nobody_runs_a_sweep_that_has_no_lock(tmp_path: Path) -> None:
    assert not is_running(SweepPaths(tmp_path))


def test_a_step_of_a_grid_is_that_points_very_value(tmp_path: Path) -> None:
    steps = {"distribution": "q_uniform", "min": 0.0, "max": 0.3, "q": 0.1}
    queue = make(tmp_path / "s", {"method": "grid", "parameters": {"lora_dropout": steps}})
    queue_setting(queue.paths, {"lora_dropout": "0.3"})  # 3 * 0.1 is another number
    dropouts = [job.config.lora_dropout for job in run_all(queue)]
    assert dropouts[0] == pytest.approx(0.3)
    assert sorted(dropouts) == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_a_request_of_a_trial_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    request = {"action": "add_seeds", "numbers": [99], "num_seeds": 1, "time": 0}
    write_json(queue.paths.requests / "1-aaaaaaaa.json", request)
    assert len(run_all(queue)) == 2
    assert pending_requests(queue.paths) == []


def test_a_trial_is_not_the_best_one_for_being_asked_more_seeds_of(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    best, other = begin(queue), begin(queue)
    end(queue, best, loss=2.0)
    end(queue, other, loss=3.0)
    add_seeds(queue.paths, [other.number], 1)
    further = begin(queue)
    end(queue, further, loss=2.5)
    assert read_sweep(queue.paths.root).best().number == best.number


def test_what_trl_trains_cannot_be_stopped(tmp_path: Path) -> None:
    queue = make(tmp_path / "s")
    job = begin(queue)
    config = {"settings": job.config.to_dict(), **(job.info or {}), "engine": "trl"}
    write_json(job.paths.config, config)
    with pytest.raises(LoraloomError, match="a trial of --engine trl cannot be stopped"):
        stop_trial(queue.paths, job.number)
