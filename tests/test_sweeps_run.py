"""A sweep is run to its end, whatever interrupts it: what is on disk and on the terminal says so.

`quick_trial` writes a trial's files in milliseconds; slow tests train the tiny model and kill the command.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

from sweeps.ledger import read_metrics, read_sweep
from sweeps.run import RunOptions, run_sweep
from sweeps.spec import read_definition
from training.exceptions import ConfigError, DataError, SweepError
from training.paths import SweepPaths, read_json, write_json

ONE_FACTOR = """
method: custom
scheduler: {engine: optuna, source: sweeps/study.py, optimizer: one_factor}
metric: {name: eval/loss, goal: minimize}
parameters:
  max_steps: {values: [1, 2, 3]}
  lora_r: {values: [4, 8, 16]}
"""
GRID = """
method: grid
metric: {name: eval/loss, goal: minimize}
parameters:
  max_steps: {values: [1, 2]}
  lora_r: {values: [4, 8, 16]}
"""
RANDOM = """
method: random
run_cap: 5
parameters:
  learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 1e-2}
"""


def loss_of(config):
    adapter = config.lora_r / 100 + config.lora_alpha / 1000
    return 2 - config.max_steps / 10 - adapter - config.learning_rate


def quick_jobs(trials, *, engine, options):
    """Stands in for `training.run.run_jobs`: fills the slots, then ends the oldest trial."""
    trial = sys.modules["training.run"].__dict__["run_trial"]
    slots = []
    while True:
        while len(slots) < max(1, options.slots) and (job := trials.next_job()) is not None:
            slots.append(job)
        if not slots:
            return
        job = slots.pop(0)
        if not job.paths.state.is_dir():
            shutil.rmtree(job.paths.root, ignore_errors=True)
        try:
            outcome = trial(job.config, job.paths, info=job.info, options=options)
            options.display.num_steps += job.config.max_steps
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            outcome = error
        trials.done(job, outcome)


class QuickTrial:
    """Trains one trial for `quick_jobs`: the same files, no training."""

    def __init__(self):
        self.started = []
        self.step_time_s = 0.0
        self.errors = {}

    def __call__(self, config, paths, *, info, options):
        self.started.append(info["number"])
        write_json(paths.config, {"settings": config.to_dict(), "engine": "trl", **info})
        for step in range(1, config.max_steps + 1):
            time.sleep(self.step_time_s)
            if options.stop.is_set():
                raise KeyboardInterrupt
            with open(paths.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "train/loss": 1.0}) + "\n")
        error = self.errors.get(info["number"]) or self.errors.get(info["name"])
        if error:
            write_json(paths.result, {"state": "failed", "reason": repr(error)})
            raise error
        write_json(paths.adapter / "adapter_config.json", {"r": config.lora_r})
        result = {
            "state": "complete",
            "eval/loss": loss_of(config),
            "base_eval/loss": 2.0,
            "best_step": config.max_steps,
            "num_steps": config.max_steps,
            "train_time_s": 0.1,
            "steps_saved": 0,
        }
        write_json(paths.result, result)
        return result


def use_quick_trial():
    trial = QuickTrial()
    module = types.ModuleType("training.run")
    module.__dict__.update(run_trial=trial, run_jobs=quick_jobs)
    sys.modules["training.run"] = module
    return trial


@pytest.fixture
def quick_trial(monkeypatch):
    # Registered so that monkeypatch puts the real module back.
    monkeypatch.setitem(sys.modules, "training.run", types.ModuleType("training.run"))
    return use_quick_trial()


class Runner:
    """Runs a definition's text as `python -m sweeps.run x.yaml` does."""

    def __init__(self, root):
        self.root = root
        self.paths = SweepPaths(root / "runs" / "x")

    def __call__(self, text, *, output_dir="runs", num_trials=None, slots=1, **more):
        path = self.root / "x.yaml"
        path.write_text(text, encoding="utf-8")
        options = RunOptions(
            output_dir=str(self.root / output_dir),
            num_trials=num_trials,
            slots=slots,
            workers=0,
            report_to="none",
            **more,
        )
        return run_sweep(read_definition(path), options)


@pytest.fixture
def run(tmp_path, quick_trial):
    assert quick_trial.started == []
    return Runner(tmp_path)


def points(record):
    return [(trial.params["max_steps"], trial.params["lora_r"]) for trial in record.trials]


def test_the_one_factor_design_runs_in_its_order_with_its_names(run):
    record = run(ONE_FACTOR)
    assert [trial.name for trial in record.trials] == [
        "baseline", "centre", "max_steps=3", "lora_r=4", "lora_r=16", "combination",
    ]  # fmt: skip
    assert points(record)[-1] == (3, 16)
    assert record.best().name == "combination"
    assert all(trial.state == "complete" for trial in record.trials)


def test_a_grid_runs_every_point_once(quick_trial, run):
    record = run(GRID)
    assert sorted(points(record)) == [(s, r) for s in (1, 2) for r in (4, 8, 16)]
    assert quick_trial.started == list(range(6))


def test_the_order_of_a_grid_is_always_the_same(run):
    assert points(run(GRID)) == points(run(GRID, output_dir="again"))


def test_run_cap_and_num_trials_give_the_exact_number_of_trials(quick_trial, run):
    assert len(run(RANDOM).trials) == 5
    assert len(run(RANDOM, num_trials=7).trials) == 7
    assert len(run(RANDOM).trials) == 7
    assert len(quick_trial.started) == 7


def test_num_trials_is_a_limit_for_a_grid_that_may_be_raised_later(run):
    assert len(run(GRID, num_trials=4).trials) == 4
    assert len(run(GRID, num_trials=99).trials) == 6


def test_a_bayes_sweep_runs(run):
    text = RANDOM.replace("random", "bayes\nmetric: {name: eval/loss}").replace("5", "12", 1)
    record = run(text)
    assert len({trial.params["learning_rate"] for trial in record.trials}) == 12


@pytest.mark.parametrize("optimizer", ["gp", "cmaes", "qmc"])
def test_optunas_other_samplers_run_and_repeat_nothing(run, optimizer):
    scheduler = f"scheduler: {{engine: optuna, source: sweeps/study.py, optimizer: {optimizer}}}"
    text = RANDOM.replace("method: random", f"method: custom\n{scheduler}").replace("5", "14", 1)
    record = run(text, slots=4)
    assert len({trial.params["learning_rate"] for trial in record.trials}) == 14
    assert all(1e-5 <= trial.params["learning_rate"] <= 1e-2 for trial in record.trials)


def test_a_sweep_ends_once_a_trial_reaches_the_target(run):
    record = run(ONE_FACTOR.replace("goal: minimize", "target: 1.75"))
    assert [trial.name for trial in record.trials] == ["baseline", "centre"]


def test_a_random_sweep_without_an_end_is_refused_before_anything_is_trained(run):
    with pytest.raises(ConfigError, match=r"x\.yaml: run_cap is missing, but method random needs"):
        run(RANDOM.replace("run_cap: 5", ""))
    assert not run.paths.definition.exists()
    assert len(run(RANDOM, num_trials=2).trials) == 2


def test_definition_and_environment_are_written_before_the_first_trial(quick_trial, run):
    quick_trial.errors[0] = DataError("data.jsonl: not there")
    with pytest.raises(DataError):
        run(ONE_FACTOR)
    assert run.paths.definition.read_text() == ONE_FACTOR
    environment = read_json(run.paths.environment)
    assert environment["packages"]["torch"] and environment["python"].startswith("3.")
    assert environment["git"] is None or len(environment["git"]["commit"]) == 40


def test_a_finished_sweep_trains_nothing_more(quick_trial, run):
    run(ONE_FACTOR)
    before = list(quick_trial.started)
    assert len(run(ONE_FACTOR).all_trials) == 6
    assert quick_trial.started == before


def test_a_combination_that_is_known_is_copied_and_not_trained(quick_trial, run):
    text = ONE_FACTOR.replace("[4, 8, 16]", "[4, 16, 8]")
    record = run(text)
    combination = record.trials[-1]
    assert combination.name == "combination" and combination.params["lora_r"] == 16
    assert combination.result["same_as"] == 2
    assert combination.result["steps_saved"] == 3
    assert combination.loss == record.trial(2).loss
    assert (combination.paths.adapter / "adapter_config.json").is_file()
    assert read_json(combination.paths.config)["number"] == 5
    assert quick_trial.started == [0, 1, 2, 3, 4]


def test_a_failed_trial_is_run_again_by_the_next_start_and_counts_once(quick_trial, run, capsys):
    quick_trial.errors["max_steps=3"] = RuntimeError("out of memory\nwith details")
    record = run(ONE_FACTOR)
    assert [trial.state for trial in record.trials].count("failed") == 1
    assert points(record)[-1] == (2, 16)
    assert "failed: RuntimeError: out of memory" in capsys.readouterr().out
    record = run(ONE_FACTOR)  # it fails again: one attempt a start
    assert quick_trial.started == [0, 1, 2, 3, 4, 6]
    quick_trial.errors.clear()
    record = run(ONE_FACTOR)
    retry = next(trial for trial in record.trials if trial.name == "max_steps=3")
    assert (retry.state, retry.retry_of) == ("complete", 6)
    # What the retry found changes the combination, which is then tried, too.
    assert points(record)[-1] == (3, 16)
    assert len(record.trials) == 7 and len(record.all_trials) == 9


def test_a_failed_combination_is_made_anew(quick_trial, run):
    quick_trial.errors = {"max_steps=3": ValueError("a"), "combination": ValueError("b")}
    text = ONE_FACTOR + "  lora_alpha: {values: [32, 16]}\n"
    run(text)
    quick_trial.errors.clear()
    record = run(text)
    assert [trial.name for trial in record.trials].count("combination") == 1
    assert record.trials[-1].params == {"max_steps": 3, "lora_r": 16, "lora_alpha": 32}
    assert len(record.trials) == 7


def test_a_failed_combination_waits_for_the_other_failed_ones(quick_trial, run):
    quick_trial.errors = {"max_steps=3": ValueError("a"), "combination": ValueError("b")}
    text = ONE_FACTOR + "  lora_alpha: {values: [32, 16]}\n"
    run(text, slots=2)
    quick_trial.errors.clear()
    record = run(text, slots=2)  # the second slot is not for the combination yet
    assert record.trials[-1].name == "combination"
    assert record.trials[-1].params == {"max_steps": 3, "lora_r": 16, "lora_alpha": 32}
    assert [trial.state for trial in record.trials] == ["complete"] * 7


@pytest.mark.parametrize("failed", [0, 3, 5])
def test_a_grid_with_a_failed_trial_is_completed_by_the_next_start(quick_trial, run, failed):
    quick_trial.errors[failed] = ValueError("bad luck")
    run(GRID)
    record = run(GRID)
    assert sorted(points(record)) == [(s, r) for s in (1, 2) for r in (4, 8, 16)]
    assert all(trial.state == "complete" for trial in record.trials)
    assert len(quick_trial.started) == 7


def test_three_failures_in_a_row_stop_the_sweep_with_the_first_cause(quick_trial, run):
    quick_trial.errors = {2: ValueError("the cause"), 3: KeyError("x"), 4: OSError("y")}
    with pytest.raises(SweepError) as caught:
        run(RANDOM, num_trials=20)
    text = str(caught.value)
    assert "3 trials failed in a row" in text and "trial 2" in text
    assert "ValueError: the cause" in text and "\n" not in text
    assert quick_trial.started == [0, 1, 2, 3, 4]
    quick_trial.errors.clear()
    record = run(RANDOM, num_trials=20)
    assert len(record.trials) == 20 and all(t.state == "complete" for t in record.trials)


def test_failures_that_are_not_in_a_row_do_not_stop_the_sweep(quick_trial, run):
    quick_trial.errors = {number: ValueError("x") for number in (0, 1, 3, 4, 6, 7)}
    assert len(run(RANDOM, num_trials=9).trials) == 9


def test_bad_data_stops_the_sweep_at_once_and_the_same_command_continues(quick_trial, run):
    quick_trial.errors[1] = DataError("data.jsonl: line 3 is not a record")
    with pytest.raises(DataError, match="line 3 is not a record"):
        run(ONE_FACTOR)
    assert quick_trial.started == [0, 1]
    record = run(ONE_FACTOR)
    assert [trial.state for trial in record.trials] == ["complete"] * 6
    assert quick_trial.started == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_trial_is_run_again_under_its_number(run, error):
    original = QuickTrial.__call__

    class Interrupted(QuickTrial):
        def __call__(self, config, paths, **kwargs):
            if kwargs["info"]["number"] == 2 and self.started == [0, 1]:
                self.started.append(2)
                write_json(paths.config, {"settings": {}})
                paths.metrics.write_text('{"step": 1}\n{"st')
                raise error
            return original(self, config, paths, **kwargs)

    trial = Interrupted()
    sys.modules["training.run"].__dict__["run_trial"] = trial
    with pytest.raises(type(error)):
        run(ONE_FACTOR)
    record = run(ONE_FACTOR)
    assert trial.started == [0, 1, 2, 2, 3, 4, 5]
    assert len(record.all_trials) == 6
    assert [line["step"] for line in record.trial(2).metrics()] == [1, 2, 3]


def test_a_trial_that_ended_before_it_was_told_is_not_trained_again(quick_trial, run, monkeypatch):
    from sweeps.trial_queue import TrialQueue

    tell = TrialQueue._tell

    def killed(self, number, result):
        if number == 1:
            raise KeyboardInterrupt
        tell(self, number, result)

    with monkeypatch.context() as patch:
        patch.setattr(TrialQueue, "_tell", killed)
        with pytest.raises(KeyboardInterrupt):
            run(ONE_FACTOR)
    record = run(ONE_FACTOR)
    assert quick_trial.started == [0, 1, 2, 3, 4, 5]
    assert len(record.trials) == 6


def test_a_trial_whose_loss_is_not_a_number_has_failed(run):
    original = QuickTrial.__call__

    class Diverged(QuickTrial):
        def __call__(self, config, paths, **kwargs):
            result = original(self, config, paths, **kwargs)
            if kwargs["info"]["number"] == 1:
                result = {**result, "state": "failed", "eval/loss": None, "reason": "loss is NaN"}
                write_json(paths.result, result)
            return result

    sys.modules["training.run"].__dict__["run_trial"] = Diverged()
    record = run(ONE_FACTOR)
    assert [trial.state for trial in record.trials].count("failed") == 1


def test_the_directory_of_another_definition_is_refused(run):
    run(ONE_FACTOR)
    with pytest.raises(SweepError, match=r"runs/x: holds another sweep: parameters.lora_r is not"):
        run(ONE_FACTOR.replace("16]", "32]"))
    run(ONE_FACTOR + "description: only words\n")
    assert "only words" in run.paths.definition.read_text()


def test_a_directory_that_is_no_sweeps_is_left_alone(run):
    run.paths.root.mkdir(parents=True)
    (run.paths.root / "thesis.txt").write_text("mine")
    with pytest.raises(SweepError, match=r"has files, but no sweep.yaml: not a sweep's"):
        run(ONE_FACTOR)
    assert [path.name for path in run.paths.root.iterdir()] == ["thesis.txt"]


def test_a_lost_study_is_an_error_and_not_a_new_start(run):
    run(ONE_FACTOR)
    run.paths.study.unlink()
    with pytest.raises(SweepError, match=r"has trials, but study.db is missing"):
        run(ONE_FACTOR)


def test_trials_in_flight_at_once_give_the_same_sweep(quick_trial, run):
    """Three slots: the combination waits for all the others, and nothing is tried twice."""
    record = run(ONE_FACTOR, slots=3)
    assert [trial.name for trial in record.trials][-1] == "combination"
    assert quick_trial.started == [0, 1, 2, 3, 4, 5]
    assert len(set(points(record))) == len(points(record)) == 6
    assert record.trials[-1].params == {"max_steps": 3, "lora_r": 16}


def test_a_grid_with_several_slots_trains_each_point_once(quick_trial, run):
    record = run(GRID, slots=4)
    assert len(set(points(record))) == len(record.trials) == 6
    assert len(quick_trial.started) == 6


def test_a_point_that_is_running_already_is_not_trained_a_second_time(quick_trial, run):
    text = GRID.replace("method: grid", "method: random\nrun_cap: 12")
    record = run(text, slots=4)
    assert len(record.trials) == 12
    distinct = len(set(points(record)))
    assert len(quick_trial.started) == distinct < 12
    assert sum("same_as" in trial.result for trial in record.trials) == 12 - distinct


def test_a_second_runner_is_told_who_runs_the_sweep(run):
    class Second(QuickTrial):
        def __call__(self, *args, **kwargs):
            with pytest.raises(SweepError, match=f"is being run by process {os.getpid()}"):
                run(ONE_FACTOR)
            return super().__call__(*args, **kwargs)

    sys.modules["training.run"].__dict__["run_trial"] = Second()
    assert len(run(ONE_FACTOR).trials) == 6


def test_the_terminal_shows_trials_the_best_so_far_and_what_is_next(quick_trial, run, capsys):
    quick_trial.step_time_s = 0.01
    run(ONE_FACTOR)
    text = capsys.readouterr().out
    assert "trial 0 (1 of 6) baseline: max_steps=1 lora_r=8" in text
    assert "eval/loss 1.7038, best so far 1.7038 (trial 1)" in text
    assert " left" in text
    assert (
        "best: trial 5 combination, eval/loss 1.5238 at step 3; the base model has 2.0000" in text
    )
    assert f"next: python -m analysis.report {run.paths.root}" in text


COMMAND = "import test_sweeps_run as t; t.use_quick_trial().step_time_s = 0.05; t.command()"


def command():
    from sweeps.run import main
    from training.cli import run_command

    run_command(main)


def start(tmp_path, text, code: str | None = COMMAND):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    argv = [
        str(path),
        *(["--workers", "0"] if code else []),
        "--output_dir",
        str(tmp_path / "runs"),
        "--report_to",
        "none",
    ]
    python = ["-c", code] if code else ["-m", "sweeps.run"]
    return subprocess.Popen(
        [sys.executable, *python, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'tests'}"},
    )


def wait_for_step(paths, number, step, timeout_s):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(line.get("step") == step for line in read_metrics(paths.trial(number).metrics)):
            return
        time.sleep(0.02)
    raise AssertionError(f"trial {number} did not reach step {step} in {timeout_s} s")


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_the_same_command_continues_after_a_kill_and_trains_nothing_twice(tmp_path, sent):
    paths = SweepPaths(tmp_path / "runs" / "x")
    process = start(tmp_path, ONE_FACTOR)
    wait_for_step(paths, 2, 1, timeout_s=60)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    if sent != signal.SIGKILL:
        assert process.returncode == 128 + sent
        assert stderr.strip().splitlines() == [
            "saving the trials in flight; once more to end at once",
            "",
            "interrupted; the same command continues",
        ]
    ended = {trial.number: trial.paths.result.stat().st_mtime_ns
             for trial in read_sweep(paths.root).finished}  # fmt: skip
    assert set(ended) == {0, 1}
    process = start(tmp_path, ONE_FACTOR)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert "2 of 6 trials are already there" in stdout
    record = read_sweep(paths.root)
    assert [trial.number for trial in record.all_trials] == list(range(6))
    assert [trial.state for trial in record.all_trials] == ["complete"] * 6
    for number, time_ns in ended.items():
        assert record.trial(number).paths.result.stat().st_mtime_ns == time_ns
    assert [line["step"] for line in record.trial(2).metrics()] == [1, 2, 3]


def test_a_mistake_in_the_definition_is_one_line_and_exit_2(tmp_path):
    process = start(tmp_path, ONE_FACTOR.replace("lora_r", "lora_rr"))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr == (
        f"error: {tmp_path / 'x.yaml'}: parameters.lora_rr is not a setting; "
        "did you mean 'lora_r'?\n"
    )


def test_help_shows_every_option_with_its_default():
    done = subprocess.run(
        [sys.executable, "-m", "sweeps.run", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    for text in ("config", "--output_dir", "--num_trials", "--report_to", "default: runs"):
        assert text in done.stdout


def test_what_decides_does_not_load_what_trains():
    """--help, a mistake's message and the runner beside its workers: none of them needs torch."""
    code = "import sys, sweeps.run, sweeps.stages; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0


def real_sweep(tiny_settings):
    """One factor moved at a time, five trials of seconds, with the tiny model."""
    varied = {"max_steps": [2, 40], "lora_r": [2, 4, 8]}
    constants = {name: value for name, value in tiny_settings.items() if name not in varied}
    parameters = {name: {"values": values} for name, values in varied.items()}
    parameters |= {name: {"value": value} for name, value in constants.items()}
    scheduler = {"engine": "optuna", "source": "sweeps/study.py", "optimizer": "one_factor"}
    return yaml.safe_dump(
        {"method": "custom", "scheduler": scheduler, "parameters": parameters}, sort_keys=False
    )


@pytest.mark.slow
def test_a_real_sweep_that_is_killed_is_continued_by_the_same_command(tmp_path, tiny_settings):
    paths = SweepPaths(tmp_path / "runs" / "x")
    text = real_sweep(tiny_settings)
    process = start(tmp_path, text, code=None)
    deadline = time.monotonic() + 180
    while not paths.trial(0).result.is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert read_sweep(paths.root).trial(1).state == "running"
    first_ended = paths.trial(0).result.stat().st_mtime_ns
    process = start(tmp_path, text, code=None)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    record = read_sweep(paths.root)
    assert [trial.name for trial in record.all_trials] == [
        "baseline", "centre", "lora_r=2", "lora_r=8", "combination",
    ]  # fmt: skip
    assert all(trial.state == "complete" for trial in record.all_trials)
    assert paths.trial(0).result.stat().st_mtime_ns == first_ended
    for trial in record.trials:
        steps = [line["step"] for line in trial.metrics() if "train/loss" in line]
        assert steps == list(range(1, trial.params["max_steps"] + 1))
        assert trial.loss == pytest.approx(_mean(trial.eval_losses(trial.result["best_step"])))
        assert (trial.paths.adapter / "adapter_config.json").is_file()
    assert f"best: trial {record.best().number}" in stdout


def _mean(losses):
    return losses["loss_sum"].sum() / losses["num_tokens"].sum()
