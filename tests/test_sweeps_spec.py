"""A definition is read as W&B reads it, and every mistake in one is one line that says where."""

from pathlib import Path

import pytest
import yaml

from sweeps.spec import read_definition
from sweeps.terminal import make_console
from training.exceptions import ConfigError

CONFIGS = sorted(Path("sweeps/configs").glob("*.yaml"))

GOOD = """
method: grid
metric: {name: eval/loss, goal: minimize}
parameters:
  lora_r: {values: [8, 16]}
  learning_rate: {values: [1e-4, "2e-4", 0.0005]}
  max_steps: {value: 10}
"""


def read(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return read_definition(path)


def message(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'x.yaml'}: ")
    return str(caught.value).removeprefix(f"{tmp_path / 'x.yaml'}: ")


def with_parameter(text):
    return f"method: random\nparameters:\n  {text}\n"


def test_numbers_that_yaml_reads_as_text_become_numbers(tmp_path):
    definition = read(tmp_path, GOOD)
    assert definition.varied["learning_rate"]["values"] == [1e-4, 2e-4, 5e-4]


def test_bounds_that_yaml_reads_as_text_become_numbers(tmp_path):
    text = with_parameter("learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 1e-3}")
    assert read(tmp_path, text).varied["learning_rate"]["min"] == 1e-5


def test_constants_and_a_point_make_the_settings_of_a_trial(tmp_path):
    config = read(tmp_path, GOOD).trial_config({"lora_r": 8, "learning_rate": 2e-4})
    assert (config.lora_r, config.learning_rate, config.max_steps) == (8, 2e-4, 10)


def test_steps_are_counted_in_decimal_fractions(tmp_path):
    text = with_parameter("lora_dropout: {distribution: q_uniform, min: 0.0, max: 0.3, q: 0.1}")
    assert read(tmp_path, text).varied["lora_dropout"]["max"] == 0.3  # binary: 2.9999999999999996


def test_the_name_is_the_files_own_where_none_is_given(tmp_path):
    assert read(tmp_path, GOOD).name == "x"
    assert read(tmp_path, GOOD + "name: other\n").name == "other"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty, but must be a sweep definition"),
        ("- a\n", "is a list, but must be a mapping"),
        ("method: [grid\n", "line 2: not valid YAML"),
        (GOOD + "method: random\n", "line 8: not valid YAML: key 'method' is given twice"),
        ("parameters: {lora_r: {value: 8}}", "method is missing"),
        ("method: grid", "parameters is missing"),
        (GOOD + "description: 2026-02-30\n", "line 8: not valid YAML: day "),
        (GOOD + f"run_cap: {'9' * 5000}\n", "line 8: not valid YAML: Exceeds the limit"),
        (GOOD.replace("grid", "gird"), "method is 'gird', but must be one of grid, random"),
        (GOOD + "run_capp: 3\n", "run_capp is not a key of a sweep; did you mean 'run_cap'?"),
        (GOOD + "run_cap: many\n", "run_cap is 'many', but must be an integer"),
        (GOOD + "run_cap: 0\n", "run_cap is 0, but must be >= 1"),
        (GOOD + "run_cap: true\n", "run_cap is True, but must be an integer"),
        (GOOD + "command: python\n", "command is 'python', but must be a list"),
        (GOOD + "name: a/b\n", "name is 'a/b', but must be usable as a directory's name"),
        (GOOD.replace("eval/loss", "loss"), "metric.name is 'loss', but must be 'eval/loss'"),
        (GOOD.replace("minimize", "maximize"), "metric.goal is 'maximize', but must be 'minimize'"),
        (GOOD.replace("goal:", "gaol:"), "metric.gaol is not a key here; did you mean 'goal'?"),
        (GOOD + "scheduler: {engine: ax}\n", "scheduler.engine is 'ax', but must be 'optuna'"),
        (
            GOOD + "scheduler: {engine: optuna, source: a.py, optimizer: f}\n",
            "method is 'grid', but must be 'custom' with scheduler.engine optuna",
        ),
        (GOOD.replace("grid", "custom"), "method is 'custom', but then scheduler must be given"),
        (
            GOOD + "early_terminate: {type: hyperbnd}\n",
            "early_terminate.type is 'hyperbnd', but must be one of hyperband, asha, "
            "hyperband_brackets, median, percentile, patient, wilcoxon (W&B's server knows hyperband "
            "alone); did you mean 'hyperband'?",
        ),
        (GOOD + "early_terminate: {eta: 3}\n", "early_terminate.type is None, but must be one of"),
        (GOOD + "early_terminate: {type: hyperband}\n", "early_terminate must have min_iter"),
        (
            GOOD + "early_terminate: {type: hyperband, min_iter: 0}\n",
            "early_terminate.min_iter is 0, but must be an integer >= 1",
        ),
        (
            GOOD + "early_terminate: {type: hyperband, max_iter: 9}\n",
            "early_terminate.s is missing",
        ),
    ],
)  # fmt: skip
def test_a_wrong_key_is_one_line_with_the_file_and_the_key(tmp_path, text, expected):
    assert message(tmp_path, text).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_r: {value: 0}", "parameters.lora_r is 0, but must be >= 1"),
        ("lora_r: {values: [8, 0]}", "parameters.lora_r is 0, but must be >= 1"),
        ("lora_r: {values: [8, 2.5]}", "parameters.lora_r is 2.5, but must be an integer"),
        ("lora_r: {values: []}", "parameters.lora_r.values is [], but must be a list"),
        ("lora_r: {values: 8}", "parameters.lora_r.values is 8, but must be a list"),
        ("lora_r: {values: [8, 8]}", "parameters.lora_r.values has 8 twice"),
        ("lora_r: 8", "parameters.lora_r is 8, but must be a mapping, e.g. {value: 8}"),
        ("lora_r: {}", "parameters.lora_r has no value, no values, and no min"),
        ("lora_r: {min: 4}", "parameters.lora_r has no value, no values, and no max"),
        ("lora_r: {min: 0, max: 8}", "parameters.lora_r.min is 0, but must be >= 1"),
        ("lora_r: {min: 9, max: 8}", "parameters.lora_r.min is 9, but must be <= max"),
        ("lora_r: {min: 1.5, max: 8.0}", "parameters.lora_r.distribution is uniform, but must"),
        ("lora_r: {value: 8, values: [8]}", "parameters.lora_r.values is not a key here"),
        ("lora_r: {vals: [8]}", "parameters.lora_r.vals is not a key here; did you mean 'val"),
        (
            "lora_r: {min: 1, max: 8, distribution: normal}",
            "parameters.lora_r.distribution is 'normal', but must be one of",
        ),
        (
            "learning_rate: {min: 0, max: 0.1}",
            "parameters.learning_rate has min 0 and max 0.1, but both must be",
        ),
        (
            "learning_rate: {min: 0.0, max: 0.1, distribution: log_uniform_values}",
            "parameters.learning_rate.min is 0.0, but must be > 0 on a logarithmic scale",
        ),
        (
            "learning_rate: {min: low, max: 0.1}",
            "parameters.learning_rate.min is 'low', but must be a number",
        ),
        (
            "lora_dropout: {min: 0.0, max: 1.5}",
            "parameters.lora_dropout.max is 1.5, but must be < 1",
        ),
        ("lora_dropout: {min: 0.0, max: 0.5, q: 0.1}", "parameters.lora_dropout.q is given, but"),
        ("use_rslora: {min: 0, max: 1}", "parameters.use_rslora has min and max, but is not a"),
        ("lora_rank: {value: 8}", "parameters.lora_rank is not a setting; did you mean 'lora_r'?"),
        ("lr: {value: 0.1}", "parameters.lr is not a setting; did you mean 'learning_rate'?"),
        (
            "learning_rat: {value: 0.1}",
            "parameters.learning_rat is not a setting; did you mean 'learning_rate'?",
        ),
        ("load_in_4bit: {value: yess}", "parameters.load_in_4bit is 'yess', but must be true or"),
        (
            "group: {parameters: {lora_r: {value: 8}}}",
            "parameters.group is a nested group, but must be a setting: `wandb agent` would give it",
        ),
        ("8: {value: 8}", "parameters.8 is not a setting"),
        (
            "max_steps: {distribution: q_uniform, min: 10, max: 60, q: 15}",
            "parameters.max_steps.max is 60, but must be min (10) plus a whole number of steps of",
        ),
        (
            "lora_dropout: {distribution: q_uniform, min: 0.0, max: 0.5}",
            "parameters.lora_dropout.max is 0.5, but must be min (0.0) plus a whole number of steps",
        ),
        (
            "max_steps: {distribution: q_uniform, min: 10, max: 60, q: .inf}",
            "parameters.max_steps.q is inf, but must be > 0 and finite",
        ),
        (
            "learning_rate: {distribution: q_log_uniform_values, min: 0.1, max: 1.1, q: 0.5}",
            "parameters.learning_rate.q is 0.5, but must be 1 on a logarithmic scale",
        ),
        (
            "lora_alpha: {distribution: q_log_uniform_values, min: 0.5, max: 64.0}",
            "parameters.lora_alpha has min 0.5 and max 64.0, but q_log_uniform_values needs integers",
        ),
        (f"max_steps: {{value: {10**400}}}", "parameters.max_steps is 1000"),
        (
            f"max_steps: {{min: 1, max: {10**400}}}",
            f"parameters.max_steps.max is {10**400}, but must be within ±1e308",
        ),
    ],
)  # fmt: skip
def test_a_value_that_no_trial_can_have_is_refused(tmp_path, text, expected):
    assert message(tmp_path, with_parameter(text)).startswith(expected)


def test_a_grid_over_a_continuous_range_is_refused(tmp_path):
    text = "method: grid\nparameters: {learning_rate: {min: 0.1, max: 0.2}}"
    assert "but a grid needs values" in message(tmp_path, text)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("type: hyperband, min_iter: 2, etta: 3", "etta is not a key here; did you mean 'eta'?"),
        ("type: hyperband, min_iter: 2, eta: 1", "eta is 1, but must be an integer >= 2"),
        ("type: hyperband, min_iter: 2, strict: 1", "strict is 1, but must be true or false"),
        ("type: hyperband, min_iter: 2, patience: 1", "patience is not a key here"),
        ("type: asha, eta: 3", "min_iter is missing, but type asha needs it"),
        ("type: asha, min_iter: 2, s: -1", "s is -1, but must be an integer >= 0"),
        ("type: asha, min_iter: 2, max_iter: 9", "max_iter is not a key here; did you mean 'min_"),
        ("type: hyperband_brackets, min_iter: 2", "max_iter is missing, but type hyperband_brackets"),
        ("type: hyperband_brackets, min_iter: 1, max_iter: 9", "min_iter is 1, but must be an integer >= 2"),
        ("type: hyperband_brackets, min_iter: 4, max_iter: 3", "max_iter is 3, but must be >= min"),
        ("type: median, min_trials: few", "min_trials is 'few', but must be an integer >= 1"),
        ("type: percentile", "percentile is missing, but type percentile needs it"),
        ("type: percentile, percentile: 100", "percentile is 100, but must be > 0 and < 100"),
        ("type: patient, min_delta: 0.1", "patience is missing, but type patient needs it"),
        ("type: patient, patience: 1.5", "patience is 1.5, but must be an integer >= 1"),
        ("type: patient, patience: 2, min_delta: -0.1", "min_delta is -0.1, but must be >= 0 and finite"),
        ("type: patient, patience: 2, min_delta: .inf", "min_delta is inf, but must be >= 0 and finite"),
        ("type: wilcoxon, p_threshold: 1", "p_threshold is 1, but must be > 0 and < 1"),
        ("type: wilcoxon, p_threshold: low", "p_threshold is 'low', but must be a number"),
        ("type: wilcoxon, strict: true", "strict is not a key here"),
    ],
)  # fmt: skip
def test_a_wrong_key_of_early_terminate_is_one_line(tmp_path, block, expected):
    text = GOOD + f"early_terminate: {{{block}}}\n"
    assert message(tmp_path, text).startswith(f"early_terminate.{expected}")


def test_a_threshold_that_yaml_reads_as_text_becomes_a_number(tmp_path):
    definition = read(tmp_path, GOOD + "early_terminate: {type: wilcoxon, p_threshold: 5e-2}\n")
    assert definition.config["early_terminate"]["p_threshold"] == 0.05


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a sweep definition: No such file"):
        read_definition(tmp_path / "x.yaml")


def test_two_definitions_differ_by_what_they_train_and_not_by_their_description(tmp_path):
    first = read(tmp_path, GOOD)
    second = read(tmp_path, GOOD + "description: the same\nrun_cap: 2\n")
    third = read(tmp_path, GOOD.replace("[8, 16]", "[8, 32]"))
    assert first.difference(second) is None
    assert first.difference(third) == "parameters.lora_r"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_definition_is_right_and_says_the_same_to_wandb(path):
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

    definition = read_definition(path)
    config = yaml.safe_load(definition.text)  # W&B's own way to read it
    _validate_config_and_fill_distribution(config)  # raises ValueError for what W&B refuses
    # No number is left to our own conversion: W&B takes the file's values as they are.
    for name, spec in config["parameters"].items():
        for key in ("value", "values", "min", "max"):
            if key in spec:
                assert spec[key] == definition.parameters[name][key]


def test_an_error_shows_on_the_terminal_as_it_is(capsys):
    make_console().print("[red]x[/blue] of [q_proj] :key: stays")  # Rich's markup, in any other
    assert capsys.readouterr().out == "[red]x[/blue] of [q_proj] :key: stays\n"


def test_five_definitions_are_shipped():
    assert [path.stem for path in CONFIGS] == ["asha", "bayes", "grid", "nine_runs", "quickstart"]


def test_wandbs_agent_launches_a_trial_from_a_shipped_definition():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    config = yaml.safe_load(Path("sweeps/configs/nine_runs.yaml").read_text("utf-8"))
    args = {name: {"value": spec.get("value", spec.get("values", [None])[0])}
            for name, spec in config["parameters"].items()}  # fmt: skip
    flags = create_sweep_command_args({"args": args})["args"]
    assert create_sweep_command(config["command"])[1:4] == ["python", "-m", "training.run"]
    assert "--max_steps=60" in flags and "--load_in_4bit=True" in flags
