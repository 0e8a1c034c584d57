"""A sweep directory is read back as records, also while it is being written."""

import json

import pandas as pd
import pytest

from sweeps.ledger import StepCount, read_metrics, read_sweep, read_trial
from training.config import TrialConfig
from training.exceptions import SweepError
from training.paths import SweepPaths, write_json


@pytest.fixture
def paths(tmp_path):
    sweep = SweepPaths(tmp_path / "nine")
    sweep.root.mkdir()
    sweep.definition.write_text("method: grid\nparameters: {lora_r: {values: [8, 16]}}\n")
    return sweep


def add_trial(sweep, number, loss=None, state="complete", retry_of=None, **settings):
    paths = sweep.trial(number)
    config = TrialConfig(**settings)
    write_json(
        paths.config,
        {
            "settings": config.to_dict(),
            "engine": "trl",
            "number": number,
            "name": f"trial {number}",
            "params": settings,
            "retry_of": retry_of,
            "sweep": "nine",
        },
    )
    if state != "running":
        write_json(paths.result, {"state": state, "eval/loss": loss})
    return paths


def test_a_sweep_is_its_definition_and_its_trials_in_order(paths):
    for number in (10, 2, 0):
        add_trial(paths, number, loss=1.0, lora_r=8)
    sweep = read_sweep(paths.root)
    assert sweep.name == "nine"
    assert sweep.definition["method"] == "grid"
    assert [trial.number for trial in sweep.trials] == [0, 2, 10]
    assert sweep.trial(2).params == {"lora_r": 8}
    assert sweep.trial(2).config == TrialConfig(lora_r=8)


def test_a_trial_without_a_result_is_running(paths):
    add_trial(paths, 0, state="running")
    trial = read_sweep(paths.root).trials[0]
    assert (trial.state, trial.loss, trial.result) == ("running", None, {})


def test_a_trial_directory_without_settings_is_not_there_yet(paths):
    paths.trial(0).root.mkdir(parents=True)
    (paths.trials / ".0001.temporary").mkdir()
    assert read_sweep(paths.root).all_trials == []


def test_a_failed_trial_that_was_run_again_does_not_count(paths):
    add_trial(paths, 0, state="failed")
    add_trial(paths, 1, state="failed", retry_of=0)
    add_trial(paths, 2, loss=1.0, retry_of=1)
    sweep = read_sweep(paths.root)
    assert [trial.number for trial in sweep.trials] == [2]
    assert [trial.number for trial in sweep.all_trials] == [0, 1, 2]


def test_the_best_trial_is_the_finished_one_with_the_lowest_loss_and_the_first_of_equals(paths):
    add_trial(paths, 0, loss=1.5)
    add_trial(paths, 1, loss=1.2)
    add_trial(paths, 2, loss=1.2)
    add_trial(paths, 3, loss=0.1, state="pruned")
    add_trial(paths, 4, loss=None)
    add_trial(paths, 5, state="running")
    assert read_sweep(paths.root).best().number == 1


def test_without_a_finished_trial_there_is_no_best_one(paths):
    add_trial(paths, 0, state="failed")
    with pytest.raises(SweepError, match="no trial has finished, so there is no best one"):
        read_sweep(paths.root).best()


def test_a_torn_last_line_of_the_metrics_is_skipped(paths):
    trial = add_trial(paths, 0, loss=1.0)
    whole = [{"step": 1, "train/loss": 2.0}, {"step": 1, "eval/loss": 1.9}]
    text = "".join(json.dumps(line) + "\n" for line in whole)
    trial.metrics.write_text(text + '{"step": 2, "tra')
    assert read_metrics(trial.metrics) == whole
    assert read_trial(trial).metrics() == whole


def test_losses_per_example_are_read_at_a_step(paths):
    trial = add_trial(paths, 0, loss=1.0)
    losses = pd.DataFrame({"example_id": ["a"], "loss_sum": [3.0], "num_tokens": [2]})
    trial.eval_losses(5).parent.mkdir()
    losses.to_parquet(trial.eval_losses(5))
    pd.testing.assert_frame_equal(read_trial(trial).eval_losses(5), losses)


def test_samples_are_read_by_step_and_damaged_ones_are_left_out(paths):
    trial = add_trial(paths, 0, loss=1.0)
    assert read_trial(trial).samples() == {}
    sample = {"prompt": "Why?", "response": "So.", "num_tokens": 2, "ended": True}
    for step in (16, 0, 8):
        write_json(trial.sample(step), {"step": step, "max_new_tokens": 64, "samples": [sample]})
    assert list(read_trial(trial).samples()) == [0, 8, 16]
    trial.sample(8).write_text('{"step": 8, "samp')
    write_json(trial.sample(16), {"step": 16, "samples": [{"prompt": "Why?"}]})
    write_json(trial.sample(24), ["no object"])
    trial.sample(32).write_bytes(b"\xff\xfe")
    (trial.samples / "0x.json").write_text("{}")
    assert read_trial(trial).samples() == {0: [sample]}


def test_what_is_no_sweep_directory_is_one_line(paths, tmp_path):
    with pytest.raises(SweepError, match=r"gone is not a directory, but must be a sweep's"):
        read_sweep(tmp_path / "gone")
    paths.definition.unlink()
    with pytest.raises(SweepError, match=r"nine has no sweep.yaml, so it is not a sweep directory"):
        read_sweep(paths.root)
    with pytest.raises(SweepError, match="is not a directory"):
        read_sweep(tmp_path / "a" / "file")


def test_an_unknown_trial_number_is_one_line(paths):
    with pytest.raises(SweepError, match="trial 7 is not there"):
        read_sweep(paths.root).trial(7)


def test_steps_are_trained_or_saved_or_pruned():
    steps = StepCount()
    steps.add({"state": "complete", "num_steps": 60, "steps_saved": 25}, max_steps=60)
    steps.add({"state": "pruned", "num_steps": 12, "steps_saved": 4}, max_steps=30)
    steps.add({"state": "failed", "num_steps": 3}, max_steps=30)
    steps.add({"state": "failed", "reason": "no data"}, max_steps=30)
    assert (steps.trained, steps.saved, steps.pruned) == (35 + 8 + 3, 29, 18)
