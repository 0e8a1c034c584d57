import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig

from training.config import TrialConfig
from training.exceptions import ConfigError

OWN_SETTINGS = {
    # Not TRL's or Transformers': the split, and how much of it is scored.
    "validation_fraction",
    "test_fraction",
    "max_eval_samples",
    # `trl.ScriptArguments`, which importing would parse nothing of.
    "dataset_name",
    "dataset_train_split",
    # Transformers takes these inside `lr_scheduler_kwargs`.
    "decay_fraction",
    "decay_type",
}


def test_setting_names_are_those_of_trl_and_transformers() -> None:
    known = {
        field.name
        for owner in (TrainingArguments, SFTConfig, ModelConfig)
        for field in dataclasses.fields(owner)
    }
    # PEFT's LoraConfig says target_modules and use_rslora; TRL's command line as below.
    ours = {field.name for field in dataclasses.fields(TrialConfig)} - OWN_SETTINGS
    assert ours - known == set()


def test_numbers_may_be_text_as_yaml_reads_them() -> None:
    config = TrialConfig.from_dict({"learning_rate": "2e-4", "max_steps": "60", "lora_r": 8.0})
    assert (config.learning_rate, config.max_steps, config.lora_r) == (2e-4, 60, 8)


@pytest.mark.parametrize(
    ("setting", "value", "must"),
    [
        ("max_steps", 0, "x.yaml: parameters.max_steps is 0, but must be >= 1"),
        ("max_steps", 1.5, "x.yaml: parameters.max_steps is 1.5, but must be an integer"),
        ("lora_r", -4, "x.yaml: parameters.lora_r is -4, but must be >= 1"),
        ("lora_r", True, "x.yaml: parameters.lora_r is True, but must be an integer"),
        ("learning_rate", -1e-4, "x.yaml: parameters.learning_rate is -0.0001, but must be > 0"),
        (
            "learning_rate",
            "fast",
            "x.yaml: parameters.learning_rate is 'fast', but must be a number",
        ),
        ("learning_rate", float("nan"), "x.yaml: parameters.learning_rate is nan, but must be > 0"),
        (
            "load_in_4bit",
            "yes",
            "x.yaml: parameters.load_in_4bit is 'yes', but must be true or false",
        ),
        ("lora_dropout", 1, "x.yaml: parameters.lora_dropout is 1.0, but must be < 1"),
        pytest.param(
            "max_steps",
            10**400,
            f"x.yaml: parameters.max_steps is {10**400}, but must be within ±1e308",
            id="400 digits",
        ),
        pytest.param(
            "lora_target_modules",
            f"[{'9' * 5000}]",
            f"x.yaml: parameters.lora_target_modules is '[{'9' * 5000}]', but must be a list of names",
            id="5000 digits",
        ),
    ],
)
def test_a_wrong_value_names_the_setting_and_what_it_must_be(
    setting: str, value: object, must: str
) -> None:
    with pytest.raises(ConfigError) as error:
        TrialConfig.from_dict({setting: value}, "x.yaml: parameters")
    assert str(error.value) == must


def test_a_misspelt_setting_suggests_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="learnin_rate is not a setting; did you mean 'learning_rate'"
    ):
        TrialConfig.from_dict({"learnin_rate": 1e-4})


def test_a_misspelt_choice_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"must be one of linear, .*; did you mean 'cosine'"):
        TrialConfig.from_dict({"lr_scheduler_type": "cosin"})


@given(st.floats(min_value=1e-8, max_value=10), st.integers(1, 4096), st.integers(1, 10**6))
def test_settings_survive_their_json_form(rate: float, rank: int, steps: int) -> None:
    config = TrialConfig(learning_rate=rate, lora_r=rank, max_steps=steps)
    assert TrialConfig.from_dict(config.to_dict()) == config
