"""A trial's settings as the `trl sft` command that trains it without us."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import DEMO, TrialConfig
from training.schedules import scheduler_kwargs

# Settings with the same name and meaning on TRL's command line.
_SHARED = (
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_length",
    "seed",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
)
_DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_DIRECTORY = "demo-set"


def replay_command(config: TrialConfig) -> str:
    """The command, one option a line."""
    is_demo_model = config.model_name_or_path == DEMO
    options: list[tuple[str, str]] = [
        ("model_name_or_path", _DEMO_MODEL if is_demo_model else config.model_name_or_path),
        ("dataset_name", _dataset(config)),
        ("dataset_train_split", config.dataset_train_split),
        ("use_peft", ""),
    ]
    options += [(name, _text(getattr(config, name))) for name in _SHARED]
    schedule = scheduler_kwargs(config)
    if schedule:
        options.append(("lr_scheduler_kwargs", shlex.quote(json.dumps(schedule))))
    options.append(("lora_target_modules", " ".join(map(shlex.quote, config.lora_target_modules))))
    options += [(name, "") for name in ("use_rslora", "load_in_4bit") if getattr(config, name)]
    if config.model_revision != "main":
        options.append(("model_revision", config.model_revision))
    options += [
        # The name that replaces gradient_checkpointing, whose use TRL warns of.
        ("activation_checkpointing", str(config.gradient_checkpointing)),
        ("assistant_only_loss", "True"),
        ("eval_strategy", "no"),
        ("output_dir", "trl-replay"),
    ]
    if config.dtype == "float32":
        options.append(("bf16", "False"))
    return _command(options)


def replay_template(params: Mapping[str, Any]) -> str:
    """The command for a run of which only `params` are known."""
    options = [("model_name_or_path", "MODEL"), ("dataset_name", "DATASET"), ("use_peft", "")]
    options += [(name, _text(value)) for name, value in params.items()]
    options.append(("output_dir", "trl-replay"))
    return _command(options)


def replay_notes(config: TrialConfig) -> list[str]:
    """What differs between that command and the trial."""
    notes = [
        "TRL trains on every record of the dataset, also on those that the trial held out.",
        "`assistant_only_loss` needs a chat template that TRL knows, or one with generation markers.",
    ]
    if config.dataset_name == DEMO:
        notes.append(
            f"The demo set is made on your machine: `mkdir {_DEMO_DIRECTORY} && "
            f"python -m training.demo_data > {_DEMO_DIRECTORY}/train.jsonl`."
        )
    elif Path(config.dataset_name).suffix:
        notes.append("TRL takes a local dataset by its directory, and reads every file in it.")
    if config.dtype == "auto":
        notes.append("On a machine without bfloat16, add `--bf16 False`.")
    return notes


def _command(options: list[tuple[str, str]]) -> str:
    lines = [f"--{name} {value}".rstrip() for name, value in options]
    return " \\\n  ".join(["trl sft", *lines])


def _dataset(config: TrialConfig) -> str:
    name = config.dataset_name
    if name == DEMO:
        return _DEMO_DIRECTORY
    return shlex.quote(str(Path(name).parent) if Path(name).suffix else name)


def _text(value: object) -> str:
    # TRL's lora_alpha is an integer.
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if is_whole and isinstance(value, float) else str(value)
