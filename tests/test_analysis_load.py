"""A sweep directory or a CSV becomes the same kind of results; what is wrong in a CSV is one line."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.load import load_source
from training.config import TrialConfig
from training.exceptions import DataError, LoraloomError, SweepError
from training.paths import SweepPaths, read_json, write_json, write_text

NINE_RUNS = Path(__file__).parent / "data" / "nine_runs.csv"
HEADER = "name,steps,lr,rank,loss,minutes\n"
ROW = "a,60,2e-4,16,1.1774,7.7\n"


@pytest.fixture
def sweep(tmp_path):
    paths = SweepPaths(tmp_path / "ranks")
    write_text(paths.definition, "method: grid\nparameters: {lora_r: {values: [8, 16]}}\n")
    return paths


def add_trial(sweep, number, rank, loss=None, state="complete", **result):
    paths = sweep.trial(number)
    params = {"lora_r": rank, "max_length": 64}
    settings = TrialConfig.from_dict(params).to_dict()
    record = {"settings": settings, "number": number, "name": f"r{rank}", "params": params}
    write_json(paths.config, record)
    if state != "running":
        write_json(
            paths.result, {"state": state, "eval/loss": loss, "train_time_s": 90.0, **result}
        )
    return paths


def write_csv(tmp_path, text):
    path = tmp_path / "runs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_nine_runs_have_trl_names_and_their_numbers():
    results = load_source(NINE_RUNS)
    assert (results.name, results.sweep, len(results.trials)) == ("nine_runs", None, 9)
    assert results.settings == ["max_steps", "learning_rate", "lora_r"]
    assert results.best.name == "exp9_optimal_combination"
    assert results.best.params == {"max_steps": 1000, "learning_rate": 5e-4, "lora_r": 32}
    assert (results.best.loss, results.best.minutes) == (0.8916, 52.1)
    assert results.baseline.name == "exp1_baseline_60steps"
    assert results.minutes == pytest.approx(231.9)


def test_trials_that_did_not_finish_are_shown_but_never_best(sweep):
    add_trial(sweep, 0, 8, 1.5)
    add_trial(sweep, 1, 16, 0.1, state="pruned")
    add_trial(sweep, 2, 32, 0.1, state="failed", reason="out of memory")
    add_trial(sweep, 3, 64, state="running")
    add_trial(sweep, 4, 128, None)
    results = load_source(sweep.root)
    assert [trial.state for trial in results.trials] == (
        ["complete", "pruned", "failed", "running", "complete"]
    )
    assert [trial.number for trial in results.ranked] == [0]
    assert results.trials[2].reason == "out of memory"


def test_only_settings_that_vary_are_named_as_varied(sweep):
    add_trial(sweep, 0, 8, 1.5)
    add_trial(sweep, 1, 16, 1.4)
    assert load_source(sweep.root).settings == ["lora_r"]


def test_of_equal_trials_the_first_is_best_and_a_copy_takes_no_time(sweep):
    add_trial(sweep, 0, 8, 1.5)
    add_trial(sweep, 1, 16, 1.4)
    add_trial(sweep, 2, 16, 1.4, same_as=1)
    results = load_source(sweep.root)
    assert results.best.number == 1
    assert results.minutes == pytest.approx(3.0)


def test_a_baseline_is_the_first_finished_trial_where_none_is_called_so(sweep):
    add_trial(sweep, 0, 8, state="failed")
    add_trial(sweep, 1, 16, 1.4)
    add_trial(sweep, 2, 32, 1.3)
    assert load_source(sweep.root).baseline.number == 1


def add_named(sweep, number, name, loss=None, state="complete", **result):
    paths = add_trial(sweep, number, 8 * (number + 1), loss, state, **result)
    write_json(paths.config, read_json(paths.config) | {"name": name})


@pytest.mark.parametrize(
    ("names", "baseline"),
    [
        (["a", "baseline"], 1),
        (["baseline_v2", "Baseline"], 1),
        (["a", "my-baseline 2"], 1),
        (["a", "dataset_name=baseline_v2"], 0),
        (["a", "baselines"], 0),
    ],
)
def test_a_baseline_is_called_so_and_not_by_its_parameters(sweep, names, baseline):
    for number, name in enumerate(names):
        add_named(sweep, number, name, 1.5)
    results = load_source(sweep.root)
    assert results.baseline.number == baseline
    assert (results.baseline_note is None) == (baseline == 1)


def test_a_baseline_that_cannot_be_compared_is_not_replaced_in_silence(sweep):
    add_named(sweep, 0, "baseline", state="failed")
    add_named(sweep, 1, "baseline_v2", 1.3)
    results = load_source(sweep.root)
    assert results.baseline.number == 1
    assert (
        results.baseline_note == "The baseline, baseline, is failed: baseline_v2 stands in for it."
    )

    add_named(sweep, 0, "baseline", 1.4, validation_hash="other")
    add_named(sweep, 2, "more", 1.2)
    results = load_source(sweep.root)
    assert results.baseline.number == 1
    assert "The baseline, baseline, was scored on other examples" in str(results.baseline_note)


def test_trials_of_the_validation_set_that_most_have_are_ranked(sweep):
    for number, (loss, examples) in enumerate([(1.0, "a"), (1.5, "b"), (1.4, "b"), (0.9, "c")]):
        add_trial(sweep, number, 8 * (number + 1), loss, validation_hash=examples)
    results = load_source(sweep.root)
    assert [trial.number for trial in results.ranked] == [2, 1]
    assert [trial.number for trial in results.scored] == [0, 1, 2, 3]


def test_losses_per_example_are_those_of_the_best_step_and_of_the_base(sweep):
    paths = add_trial(sweep, 0, 8, 1.5, best_step=4, num_steps=8)
    for step in (0, 4):
        paths.eval_losses(step).parent.mkdir(exist_ok=True)
        frame = pd.DataFrame({"example_id": ["a"], "loss_sum": [float(step)], "num_tokens": [1]})
        frame.to_parquet(paths.eval_losses(step))
    trial: Any = load_source(sweep.root).best
    assert trial.example_losses()["loss_sum"].item() == 4
    assert trial.base_example_losses()["loss_sum"].item() == 0
    assert trial.last_example_losses() is None


def test_a_torn_parquet_file_costs_the_interval_and_not_the_report(sweep):
    paths = add_trial(sweep, 0, 8, 1.5, best_step=4)
    paths.eval_losses(4).parent.mkdir()
    paths.eval_losses(4).write_bytes(b"PAR1torn")
    assert load_source(sweep.root).best.example_losses() is None


def test_a_damaged_record_is_named(sweep):
    add_trial(sweep, 0, 8, 1.5).result.write_text('{"state": "comp')
    with pytest.raises(SweepError, match=r"0000/result.json: is damaged, but must be whole JSON"):
        load_source(sweep.root)


def test_a_byte_order_mark_and_spare_lines_are_no_mistake(tmp_path):
    path = write_csv(tmp_path, b"\xef\xbb\xbf" + (HEADER + "\r\n" + ROW).encode() + b"\r\n")
    assert load_source(path).best.loss == 1.1774


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: column name is missing"),
        (HEADER, "no trial has finished, so there is nothing to report on"),
        (
            "name,step,lr,rank,loss,minutes\n",
            "line 1: column steps is missing.*did you mean 'step'",
        ),
        (HEADER.replace("rank,", ""), "line 1: column rank is missing"),
        ("note," + HEADER, "line 1: column note is not known"),
        ("loss," + HEADER, "line 1: column loss is there twice"),
        (
            HEADER + ROW + "b,60,2e-4,16,oops,7\n",
            "line 3: loss is 'oops', but must be a number > 0",
        ),
        (HEADER + "b,60,2e-4,16,nan,7\n", "line 2: loss is 'nan', but must be a number > 0"),
        (HEADER + "b,60,2e-4,16,0,7\n", "line 2: loss is '0', but must be a number > 0"),
        (HEADER + "b,60,2e-4,16,1,-7\n", "line 2: minutes is '-7', but must be a number >= 0"),
        (HEADER + "b,0,2e-4,16,1,7\n", "line 2.max_steps is 0, but must be >= 1"),
        (HEADER + "b,60,2e-4,1.5,1,7\n", "line 2.lora_r is '1.5', but must be an integer"),
        (HEADER + "b,60,2e-4,16,1,1774,7,7\n", "line 2: has too many values"),
        (HEADER + "b,60\n", "line 2: has too few values"),
        (b"\xff\xfe\x00", "can't decode"),
    ],
)
def test_what_is_wrong_in_a_csv_is_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(LoraloomError, match=message) as caught:
        load_source(write_csv(tmp_path, text))
    assert "runs.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_with_nothing_to_report_on_is_one_line(tmp_path, sweep):
    with pytest.raises(DataError, match=r"gone is not there, but must be a sweep's directory or"):
        load_source(tmp_path / "gone")
    with pytest.raises(SweepError, match=r"has no sweep.yaml"):
        load_source(tmp_path)
    with pytest.raises(DataError, match="no trial has finished"):
        load_source(sweep.root)
