"""A queue of trials in one pack: slots refilled, faults kept apart, nothing lost when it is cut off."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoint import SavedState, save_state
from training.config import TrialConfig
from training.engine import PackedEngine
from training.exceptions import DataError, ModelError
from training.job import Engine, Job, JobOptions, Outcome, Trials
from training.pack import run_pack
from training.paths import TrialPaths, read_json
from training.recorder import TrialRecorder
from training.run import run_jobs, run_trial


class Queue(Trials):
    """Jobs to train, and what became of them."""

    def __init__(self, root: Path, configs: list[TrialConfig]):
        self.jobs = [
            Job(config=config, paths=TrialPaths(root / f"{n:04d}"), label=f"trial {n}")
            for n, config in enumerate(configs)
        ]
        self.left = list(self.jobs)
        self.in_flight: list[int] = []
        self.most_in_flight = 0
        self.outcomes: dict[int, Outcome] = {}
        self.on_done: Callable[[int], None] = lambda number: None

    def next_job(self) -> Job | None:
        if not self.left:
            return None
        job = self.left.pop(0)
        self.in_flight.append(self.jobs.index(job))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return job

    def done(self, job: Job, outcome: Outcome) -> None:
        number = self.jobs.index(job)
        self.in_flight.remove(number)
        assert number not in self.outcomes
        self.outcomes[number] = outcome
        self.on_done(number)

    def run(self, slots: int) -> None:
        run_pack(self, JobOptions(slots=slots, report_to="none"))

    def result(self, number: int) -> dict[str, Any]:
        return read_json(self.jobs[number].paths.result)

    def metrics(self, number: int) -> list[dict[str, Any]]:
        lines = self.jobs[number].paths.metrics.read_text().splitlines()
        return [json.loads(line) for line in lines]

    def curve(self, number: int) -> list[float]:
        return [line["train/loss"] for line in self.metrics(number) if "train/loss" in line]


@pytest.fixture
def make(tiny_settings: dict[str, Any]) -> Callable[..., TrialConfig]:
    def make_config(**settings: Any) -> TrialConfig:
        return TrialConfig.from_dict({**tiny_settings, "lora_r": 4, "max_steps": 6, **settings})

    return make_config


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_a_trial_that_is_stopped_ends_after_its_step_and_the_others_do_not(
    make: Callable[..., TrialConfig], tmp_path: Path, engine: Engine
) -> None:
    queue = Queue(tmp_path, [make(), make(learning_rate=2e-3)])
    queue.jobs[0].stop_reason = "enough"
    run_jobs(queue, engine=engine, options=JobOptions(slots=2, report_to="none"))
    stopped, other = queue.result(0), queue.result(1)
    assert (stopped["state"], stopped["reason"], stopped["num_steps"]) == ("pruned", "enough", 1)
    assert (other["state"], other["num_steps"]) == ("complete", 6)


def test_slots_are_refilled_and_every_trial_ends_once(
    make: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    configs = [make(max_steps=steps, lora_r=steps) for steps in (2, 7, 3, 5, 1)]
    queue = Queue(tmp_path, configs)
    queue.run(slots=2)
    assert sorted(queue.outcomes) == [0, 1, 2, 3, 4]
    assert queue.most_in_flight == 2
    for number, config in enumerate(configs):
        result = queue.result(number)
        assert (result["state"], result["num_steps"]) == ("complete", config.max_steps)
        alone = run_trial(config, TrialPaths(tmp_path / f"alone{number}"), report_to="none")
        assert result["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-5)
        assert not queue.jobs[number].paths.state.exists()


def test_the_packs_time_is_shared_out_among_its_trials(
    make: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    queue = Queue(tmp_path, [make(seed=seed) for seed in range(3)])
    started = time.monotonic()
    queue.run(slots=3)
    elapsed = time.monotonic() - started
    assert 0 < sum(queue.result(number)["train_time_s"] for number in range(3)) <= elapsed


def test_a_killed_pack_goes_on_from_its_last_evaluations(
    make: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    configs = [make(max_steps=12, seed=seed, lora_r=3 + seed) for seed in range(2)]
    whole = Queue(tmp_path / "whole", configs)
    whole.run(slots=2)

    killed = Queue(tmp_path / "killed", configs)
    with pytest.MonkeyPatch.context() as patch:
        step = PackedEngine.step
        calls: list[int] = []

        def dying(self: PackedEngine) -> Any:
            calls.append(1)
            if len(calls) == 11:  # after the states of steps 4 and 8
                raise KeyboardInterrupt
            return step(self)

        patch.setattr(PackedEngine, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            killed.run(slots=2)
    assert not killed.outcomes
    assert not killed.jobs[0].paths.result.exists()
    with open(killed.jobs[0].paths.metrics, "a") as file:
        file.write('{"step": 11, "trai')  # what a kill leaves of a line

    again = Queue(tmp_path / "killed", configs)
    with pytest.MonkeyPatch.context() as patch:
        trained: list[int] = []
        log_step = TrialRecorder.log_step

        def counting(self: TrialRecorder, step: int, **values: Any) -> None:
            trained.append(step)
            log_step(self, step, **values)

        patch.setattr(TrialRecorder, "log_step", counting)
        again.run(slots=2)
    assert sorted(set(trained)) == [9, 10, 11, 12]
    for number in range(2):
        assert [line["step"] for line in again.metrics(number)] == [
            line["step"] for line in whole.metrics(number)
        ]
        assert again.curve(number) == pytest.approx(whole.curve(number), rel=1e-5)
        ours, theirs = again.result(number), whole.result(number)
        assert ours["eval/loss"] == pytest.approx(theirs["eval/loss"], rel=1e-5)
        assert (ours["best_step"], ours["tokens"]) == (theirs["best_step"], theirs["tokens"])


def test_states_that_take_long_to_save_are_saved_more_rarely_and_a_killed_trial_is_whole(
    make: Callable[..., TrialConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [make(max_steps=12, seed=seed) for seed in range(2)]
    whole = Queue(tmp_path / "whole", configs)
    whole.run(slots=2)
    saved: list[int] = []

    def slow(state: SavedState, directory: Path) -> None:
        saved.append(state.step)
        time.sleep(0.5)
        save_state(state, directory)

    step = PackedEngine.step
    calls: list[int] = []

    def dying(self: PackedEngine) -> Any:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return step(self)

    killed = Queue(tmp_path / "killed", configs)
    with monkeypatch.context() as patch:
        patch.setattr("training.pack._SHORT_SAVE_S", 0.0)
        patch.setattr("training.pack.save_state", slow)
        patch.setattr(PackedEngine, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            killed.run(slots=2)
    assert saved == [4, 4]  # and not after step 8: half a second is a tenth of more than that took
    again = Queue(tmp_path / "killed", configs)
    again.run(slots=2)
    for number in range(2):
        assert [line["step"] for line in again.metrics(number)] == [
            line["step"] for line in whole.metrics(number)
        ]
        assert again.curve(number) == pytest.approx(whole.curve(number), rel=1e-5)
        assert again.result(number)["tokens"] == whole.result(number)["tokens"]


def test_an_evaluation_that_a_signal_came_before_is_made_when_the_trial_goes_on(
    make: Callable[..., TrialConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Queue(tmp_path / "whole", [make(max_steps=10)])
    whole.run(slots=1)

    stopped = Queue(tmp_path / "stopped", [make(max_steps=10)])
    options = JobOptions(slots=1, report_to="none")
    log_step = TrialRecorder.log_step

    def stopping(self: TrialRecorder, step: int, **values: Any) -> None:
        log_step(self, step, **values)
        if step == 8:
            options.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(TrialRecorder, "log_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_pack(stopped, options)
    assert stopped.metrics(0)[-1]["step"] == 8 and "eval/loss" not in stopped.metrics(0)[-1]

    again = Queue(tmp_path / "stopped", [make(max_steps=10)])
    again.run(slots=1)
    for one in (again, whole):
        evals = [line["step"] for line in one.metrics(0) if "eval/loss" in line]
        assert evals == [0, 4, 8, 10]
    assert again.curve(0) == pytest.approx(whole.curve(0), rel=1e-5)


def test_out_of_memory_shrinks_the_pack_and_loses_nothing(
    make: Callable[..., TrialConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [make(seed=seed, gradient_accumulation_steps=2) for seed in range(3)]
    expected = Queue(tmp_path / "expected", configs)
    expected.run(slots=3)

    backward = PackedEngine.backward
    refused: list[int] = []

    def limited(self: PackedEngine, trials: Any, parts: Any = None) -> Any:
        if len(trials) > 2 and any(trial.step >= 2 for trial in trials):
            refused.append(len(trials))
            backward(self, trials, parts)  # some of it was done when memory ran out
            raise torch.OutOfMemoryError
        return backward(self, trials, parts)

    monkeypatch.setattr(PackedEngine, "backward", limited)
    queue = Queue(tmp_path / "queue", configs)
    with pytest.warns(RuntimeWarning, match="out of memory with 3 trials: going on with 2"):
        queue.run(slots=3)
    assert refused == [3]
    for number in range(3):
        assert queue.curve(number) == pytest.approx(expected.curve(number), rel=1e-5)
        assert queue.result(number)["state"] == "complete"


def test_a_trial_that_finds_no_memory_waits_for_a_slot(
    make: Callable[..., TrialConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = PackedEngine.admit

    def limited(self: PackedEngine, *args: Any) -> Any:
        if len(self.trials) == 2:
            admit(self, *args)  # some of it was done when memory ran out
            self.retire(self.trials[-1])
            raise torch.OutOfMemoryError
        return admit(self, *args)

    monkeypatch.setattr(PackedEngine, "admit", limited)
    queue = Queue(tmp_path, [make(seed=seed) for seed in range(3)])
    with pytest.warns(RuntimeWarning, match="out of memory with 3 trials: going on with 2"):
        queue.run(slots=3)
    for number in range(3):
        assert queue.result(number)["state"] == "complete"


def test_one_trial_that_does_not_fit_says_what_to_change(
    make: Callable[..., TrialConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PackedEngine, "backward", full)
    queue = Queue(tmp_path, [make()])
    queue.run(slots=1)
    assert isinstance(queue.outcomes[0], ModelError)
    assert "lower per_device_train_batch_size or max_length" in queue.result(0)["reason"]


def test_a_diverging_trial_leaves_eight_results_as_they_are_without_it(
    make: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    sound = [make(seed=seed, lora_r=2 + seed) for seed in range(8)]
    expected = Queue(tmp_path / "without", sound)
    expected.run(slots=8)
    wild = make(learning_rate=1e6, max_grad_norm=0)
    queue = Queue(tmp_path / "with", [*sound[:4], wild, *sound[4:]])
    queue.run(slots=9)
    results = [queue.result(number) for number in range(9)]
    broken = results.pop(4)
    assert broken["state"] == "failed" or broken["eval/loss"] > max(r["eval/loss"] for r in results)
    for number, result in enumerate(results):
        assert result["state"] == "complete"
        theirs = expected.result(number)["eval/loss"]
        assert result["eval/loss"] == pytest.approx(theirs, rel=1e-5)


def test_a_loss_that_is_not_finite_fails_its_trial_with_the_step(
    make: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    queue = Queue(tmp_path, [make(learning_rate=1e30, max_grad_norm=0), make()])
    queue.run(slots=2)
    assert [queue.result(number)["state"] for number in (0, 1)] == ["failed", "complete"]
    assert "at step" in queue.result(0)["reason"]


def test_a_fault_of_one_trial_is_not_its_mates(
    make: Callable[..., TrialConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_eval = TrialRecorder.log_eval

    def broken(self: TrialRecorder, *args: Any) -> None:
        if self.paths.root.name == "0001":
            raise RuntimeError("a fault of ours")
        log_eval(self, *args)

    monkeypatch.setattr(TrialRecorder, "log_eval", broken)
    queue = Queue(tmp_path, [make(), make(seed=2), make(seed=3)])
    queue.run(slots=2)
    assert str(queue.outcomes[1]) == "a fault of ours"
    assert "RuntimeError: a fault of ours" in queue.jobs[1].paths.log.read_text()
    assert [queue.result(number)["state"] for number in (0, 2)] == ["complete", "complete"]


def test_a_full_disk_leaves_trials_unfinished(
    make: Callable[..., TrialConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TrialRecorder, "log_eval", full)
    queue = Queue(tmp_path, [make(), make(seed=2)])
    with pytest.raises(OSError, match="No space left"):
        queue.run(slots=2)
    assert not queue.outcomes
    assert not any(job.paths.result.exists() for job in queue.jobs)


def test_trials_of_another_base_model_wait_for_a_pack_of_their_own(
    make: Callable[..., TrialConfig], tiny_model_dir: Path, tmp_path: Path
) -> None:
    import shutil

    other = tmp_path / "other-model"
    shutil.copytree(tiny_model_dir, other)
    configs = [make(), make(model_name_or_path=str(other)), make(seed=2)]
    queue = Queue(tmp_path, configs)
    queue.run(slots=2)
    assert sorted(queue.outcomes) == [0, 1, 2]
    assert all(queue.result(number)["state"] == "complete" for number in range(3))


def test_what_done_raises_ends_the_pack_and_the_others_can_go_on(
    make: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    def stop(number: int) -> None:
        raise DataError("enough")

    queue = Queue(tmp_path, [make(max_steps=5), make(max_steps=9)])
    queue.on_done = stop
    with pytest.raises(DataError, match="enough"):
        queue.run(slots=2)
    assert queue.result(0)["state"] == "complete"
    assert not queue.jobs[1].paths.result.exists()
    assert queue.jobs[1].paths.state.is_dir()


def test_an_adapter_of_names_that_match_nothing_is_the_users_error(
    make: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    queue = Queue(tmp_path, [make(lora_target_modules=["q_prj"])])
    queue.run(slots=1)
    assert isinstance(queue.outcomes[0], ModelError)
    assert "lora_target_modules names 'q_prj'" in str(queue.outcomes[0])
