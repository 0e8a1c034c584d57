"""A definition becomes the same search here and through W&B's scheduler."""

import subprocess
import sys
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.samplers import GridSampler, RandomSampler, TPESampler
from wandb.sdk.sweeps.run_state import RunState
from wandb.sdk.sweeps.scheduler.optimizer import RunConfig, RunWithMetrics
from wandb.sdk.sweeps.scheduler.optuna import build_optuna_optimizer
from wandb.sdk.sweeps.sweep_info import SweepInfo

from sweeps.one_factor import OneFactorSampler
from sweeps.pruning import ConfirmedPruner, Pruning, build_pruner
from sweeps.spec import read_definition
from sweeps.study import build_sampler, open_study, search_space
from training.exceptions import ConfigError, SweepError
from training.paths import SweepPaths


def define(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return read_definition(path)


def as_wandb_gives_it(path):
    """The definition as W&B's scheduler receives it: its client sorts all keys."""
    config = yaml.safe_load(yaml.dump(yaml.safe_load(Path(path).read_text("utf-8"))))
    return SweepInfo("id", "nine", "entity", "project", config, "controller")


RANDOM = (
    "method: random\nrun_cap: 3\nparameters: {lora_r: {values: [8, 16]}, seed: {min: 0, max: 9}}"
)


@pytest.mark.parametrize(
    ("method", "kind"), [("grid", GridSampler), ("random", RandomSampler), ("bayes", TPESampler)]
)
def test_each_method_has_optunas_sampler(tmp_path, method, kind):
    text = f"method: {method}\nmetric: {{name: eval/loss}}\nparameters: {{lora_r: {{values: [8]}}}}"
    assert isinstance(build_sampler(define(tmp_path, text)), kind)


def test_a_random_sweep_asks_for_the_same_point_at_the_same_number(tmp_path):
    definition = define(tmp_path, RANDOM)
    space = search_space(definition)

    def point(number):
        study = optuna.create_study(sampler=build_sampler(definition, number))
        return study.ask(space).params

    assert point(1) == point(1)
    assert len({str(point(number)) for number in range(8)}) > 1


@pytest.mark.parametrize(
    ("block", "rungs"),
    [
        ("{type: hyperband, min_iter: 2, eta: 3}", [2, 6, 18]),
        ("{type: hyperband, max_iter: 27, s: 2, eta: 3}", [3, 9]),
        ("{type: hyperband, max_iter: 26, s: 9, eta: 3}", [2, 6]),
    ],
)
def test_hyperband_compares_at_wandbs_rungs(tmp_path, block, rungs):
    text = f"{RANDOM}\nmetric: {{name: eval/loss}}\nearly_terminate: {block}\n"
    pruner = build_pruner(define(tmp_path, text))
    assert isinstance(pruner, ConfirmedPruner)
    assert isinstance(pruner.inner, SuccessiveHalvingPruner)
    study = optuna.create_study(pruner=pruner)
    good = study.ask()
    for step in range(1, rungs[-1] + 1):
        good.report(1.0, step)
        assert not good.should_prune()
    stopped = []
    for rung in rungs:
        bad = study.ask()
        for step in range(1, rungs[-1] + 1):
            bad.report(1.0 if step < rung else 2.0, step)
            if bad.should_prune():
                stopped.append(step)
                break
    assert stopped == rungs


def test_without_early_terminate_nothing_is_pruned(tmp_path):
    assert isinstance(build_pruner(define(tmp_path, RANDOM)), NopPruner)


def test_a_list_valued_setting_can_be_varied(tmp_path):
    text = (
        "method: grid\nparameters: {lora_target_modules: {values: [[q_proj, v_proj], all-linear]}}"
    )
    definition = define(tmp_path, text)
    study = optuna.create_study(sampler=build_sampler(definition))
    found = []
    for _ in range(2):
        trial = study.ask(search_space(definition))
        found.append(definition.trial_config(trial.params).lora_target_modules)
        if len(found) < 2:
            study.tell(trial, 1.0)
    assert sorted(found) == [["all-linear"], ["q_proj", "v_proj"]]


def test_the_study_is_kept_in_the_sweeps_directory(tmp_path):
    definition, paths = define(tmp_path, RANDOM), SweepPaths(tmp_path / "runs#1%20")
    paths.root.mkdir()
    study = open_study(definition, paths)
    study.tell(study.ask(search_space(definition)), 1.5)
    assert paths.study.is_file()
    moved = SweepPaths(paths.root.rename(tmp_path / "renamed"))
    assert [trial.value for trial in open_study(definition, moved).trials] == [1.5]


def test_a_stored_study_ends_a_trial_by_the_losses_in_the_sweeps_directory(tmp_path):
    text = RANDOM.replace("parameters: {", "parameters: {eval_steps: {value: 5}, ")
    definition = define(
        tmp_path,
        f"{text}\nmetric: {{name: eval/loss}}\nearly_terminate: {{type: hyperband, min_iter: 2}}",
    )
    paths = SweepPaths(tmp_path)
    reasons = []
    for worse in (0.0, 1.0):
        study = open_study(definition, paths)  # by another process each time
        trial = study.ask(search_space(definition))
        losses = [number + worse for number in range(8)]
        path = paths.trial(trial.number).eval_losses(5)
        path.parent.mkdir(parents=True)
        ids = [str(number) for number in range(8)]
        pd.DataFrame({"example_id": ids, "loss_sum": losses, "num_tokens": 1}).to_parquet(path)
        config = definition.trial_config(trial.params)
        reasons.append(Pruning(study, paths).decide(trial, config, 5, 3.5 + worse))
    assert reasons[0] is None
    assert reasons[1] is not None and "best is trial 0 with 3.5000; Wilcoxon p 0.0039" in reasons[1]


def test_the_one_factor_design_ends_no_trial(tmp_path):
    here = open_study(read_definition("sweeps/configs/nine_runs.yaml"), SweepPaths(tmp_path))
    there = build_optuna_optimizer(as_wandb_gives_it("sweeps/configs/nine_runs.yaml")).study
    assert isinstance(here.pruner, NopPruner) and isinstance(there.pruner, NopPruner)


def test_a_file_that_is_no_study_is_one_line(tmp_path):
    paths = SweepPaths(tmp_path)
    paths.study.write_text("not a database" * 100)
    with pytest.raises(SweepError, match=r"study\.db: cannot be opened as a study: .*$"):
        open_study(define(tmp_path, RANDOM), paths)


CUSTOM = """
method: custom
scheduler: {{engine: optuna, source: {source}, optimizer: {optimizer}}}
parameters: {parameters}
"""


def custom(tmp_path, source, optimizer="one_factor", parameters="{lora_r: {values: [8, 16]}}"):
    text = CUSTOM.format(source=source, optimizer=optimizer, parameters=parameters)
    return define(tmp_path, text)


def test_a_schedulers_own_study_gives_sampler_and_pruner(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(
        "import optuna\n"
        "def mine(sweep):\n"
        "    assert sweep.config['parameters']['lora_r'] == {'values': [8, 16]}\n"
        "    return optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=1),\n"
        "                               pruner=optuna.pruners.MedianPruner())\n"
    )
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study = open_study(custom(tmp_path, source, "mine"), SweepPaths(tmp_path))
    assert isinstance(study.sampler, optuna.samplers.QMCSampler)
    assert isinstance(study.pruner, optuna.pruners.MedianPruner)


@pytest.mark.parametrize(
    ("source", "optimizer", "parameters", "expected"),
    [
        ("gone.py", "f", "{lora_r: {values: [8, 16]}}", "scheduler.source is 'gone.py', but that"),
        ("sweeps/study.py", "two_factor", "{lora_r: {values: [8, 16]}}", "no attribute 'two_fa"),
        ("sweeps/study.py", "one_factor", "{lora_r: {min: 8, max: 16}}", "lora_r must list values"),
        ("sweeps/study.py", "one_factor", "{lora_r: {value: 8}}", "parameters vary nothing"),
    ],
)  # fmt: skip
def test_a_scheduler_that_builds_no_study_is_one_line(
    tmp_path, source, optimizer, parameters, expected
):
    with pytest.raises(ConfigError) as caught:
        open_study(custom(tmp_path, source, optimizer, parameters), SweepPaths(tmp_path))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_nine_runs_are_the_same_here_and_through_wandbs_scheduler(tmp_path):
    path = "sweeps/configs/nine_runs.yaml"
    here = open_study(read_definition(path), SweepPaths(tmp_path)).sampler
    there = build_optuna_optimizer(as_wandb_gives_it(path)).study.sampler
    assert isinstance(here, OneFactorSampler)
    assert type(there).__name__ == "OneFactorSampler"
    # W&B loads the file by its path, so its class is another one of the same name.
    assert here.design == there.__dict__["design"]


def test_wandbs_scheduler_runs_the_design_to_its_end_and_survives_a_restart():
    sweep = as_wandb_gives_it("sweeps/configs/nine_runs.yaml")
    optimizer = build_optuna_optimizer(sweep)
    finished = []
    for count in range(20):
        if count == 5:  # the scheduler is restarted and rebuilds its study from the runs
            optimizer = build_optuna_optimizer(sweep)
            for run in finished:
                optimizer.tell_existing_finished_run(run)
        suggestions = optimizer.ask_n_runs(1)
        if not suggestions:
            break
        params = suggestions[0].config.flat_dict()
        loss = 1 / params["max_steps"] - params["learning_rate"] - params["lora_r"] / 1000
        run = RunWithMetrics(
            config=RunConfig.from_values(params),
            state=RunState.FINISHED,
            wandb_run_id=str(count),
            summary_metrics={"eval/loss": loss},
            history_metrics=[],
        )
        optimizer.tell_run(suggestions[0].run_id, run)
        finished.append(run)
    assert len(finished) == 9
    last = finished[-1].config.flat_dict()
    assert (last["max_steps"], last["learning_rate"], last["lora_r"]) == (1000, 5e-4, 32)
    assert last["model_name_or_path"] == "meta-llama/Llama-3.2-1B-Instruct"


@pytest.mark.parametrize("name", ["nine_runs", "quickstart"])
def test_wandbs_scheduler_finds_the_application_from_its_own_program(name):
    # `wandb` is a program in the environment's bin, so the working directory is not on its path.
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "import yaml, wandb\n"
        "from wandb.sdk.sweeps.sweep_info import SweepInfo\n"
        "from wandb.sdk.sweeps.scheduler.optuna import build_optuna_optimizer\n"
        f"config = yaml.safe_load(open('sweeps/configs/{name}.yaml'))\n"
        "build_optuna_optimizer(SweepInfo('i', 'n', 'e', 'p', config, 'c'))\n"
        "print(sys.modules['sweeps.one_factor'].__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(Path("sweeps/one_factor.py").resolve())
