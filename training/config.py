"""Every setting of a trial: name, default, unit and check. Names are TRL's and Transformers' own.

`TrialConfig` comes from a command line (`python -m training.run`), from a sweep's parameters or from a
trial's `config.json` (`TrialConfig.from_dict`); either way `check` has run, so the rest of the code
may trust the values. Settings say *what* is trained; where files go and who is told is not theirs.
"""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from training.exceptions import ConfigError, nearest

DEMO = "demo"

SchedulerType = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"
]


def _setting(default: Any, help: str, **limits: float) -> Any:
    """Dataclass field with a help text and limits: `ge` (>=), `gt` (>), `le`, `lt`."""
    metadata = {"help": help, "_limits": limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TrialConfig:
    """Settings of one trial.

    Raises:
        ConfigError: from `from_dict` and `check`, naming the setting, its value and what it must be.
    """

    # Model
    model_name_or_path: str = _setting(
        DEMO, "Base model: hub id, local directory, or 'demo' (SmolLM2-135M-Instruct, no network)."
    )
    model_revision: str = _setting("main", "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = _setting(False, "Run Python code that a hub model brings along.")
    dtype: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "Base model's dtype; auto is bfloat16 on a GPU that has it, float32 elsewhere."
    )
    load_in_4bit: bool = _setting(
        False, "Quantise the base model to NF4 (bitsandbytes) when loading."
    )

    # Data
    dataset_name: str = _setting(
        DEMO,
        "Hub id, local .json/.jsonl/.csv/.parquet file, or 'demo' (docstrings of installed packages).",
    )
    dataset_train_split: str = _setting(
        "train", "Split of a hub dataset to take all examples from."
    )
    validation_fraction: float = _setting(
        0.05, "Share of examples held out for eval/loss.", gt=0, lt=0.5
    )
    test_fraction: float = _setting(
        0.05, "Share of examples held out for the one test score.", gt=0, lt=0.5
    )
    max_eval_samples: int = _setting(
        256, "Most validation examples, and most test examples, that are scored.", ge=1
    )
    max_length: int = _setting(1024, "Longest sequence in tokens; the rest is cut off.", ge=8)

    # Adapter
    lora_r: int = _setting(16, "LoRA rank.", ge=1)
    lora_alpha: float = _setting(16, "LoRA alpha; the adapter is scaled by alpha / rank.", gt=0)
    lora_dropout: float = _setting(0.0, "Dropout before LoRA's A.", ge=0, lt=1)
    lora_target_modules: list[str] = _setting(
        ["all-linear"], "Layers that get an adapter: names, or 'all-linear'."
    )
    use_rslora: bool = _setting(False, "Scale by alpha / sqrt(rank) (rsLoRA).")

    # Optimisation
    max_steps: int = _setting(500, "Optimizer steps.", ge=1)
    learning_rate: float = _setting(2e-4, "Peak learning rate of AdamW.", gt=0)
    lr_scheduler_type: SchedulerType = _setting("linear", "Learning-rate schedule after warmup.")
    warmup_steps: int = _setting(0, "Steps from learning rate 0 to its peak.", ge=0)
    decay_fraction: float = _setting(
        0.2, "Share of max_steps that warmup_stable_decay cools down in.", ge=0, le=1
    )
    decay_type: Literal["1-sqrt", "linear"] = _setting(
        "1-sqrt", "Shape of warmup_stable_decay's cooldown."
    )
    per_device_train_batch_size: int = _setting(8, "Sequences in a micro-batch.", ge=1)
    gradient_accumulation_steps: int = _setting(1, "Micro-batches in a step.", ge=1)
    weight_decay: float = _setting(0.0, "AdamW's weight decay.", ge=0)
    adam_beta1: float = _setting(0.9, "AdamW's beta1.", ge=0, lt=1)
    adam_beta2: float = _setting(0.999, "AdamW's beta2.", ge=0, lt=1)
    adam_epsilon: float = _setting(1e-8, "AdamW's epsilon.", gt=0)
    max_grad_norm: float = _setting(
        1.0, "Gradients are clipped to this norm; 0 is no clipping.", ge=0
    )
    gradient_checkpointing: bool = _setting(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    seed: int = _setting(42, "Seeds the adapter, the data order and dropout.", ge=0, lt=2**32)

    # Evaluation
    eval_steps: int = _setting(50, "Steps between evaluations on the validation set.", ge=1)
    per_device_eval_batch_size: int = _setting(8, "Sequences in an evaluation batch.", ge=1)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "settings") -> Self:
        """Checked settings from plain values; numbers may be text (`"2e-4"`), as YAML reads them.

        Args:
            settings: values by name; what is missing keeps its default.
            where: stands before the setting's name in an error, e.g. `x.yaml: parameters`, or `--`.
        """
        known = {item.name: item for item in fields(cls)}
        types_by_name = typing.get_type_hints(cls)
        values = {}
        for name, value in settings.items():
            if name not in known:
                raise ConfigError(f"{_place(where, name)} is not a setting{nearest(name, known)}")
            values[name] = _convert(value, types_by_name[name], _place(where, name))
        config = cls(**values)
        config.check(where)
        return config

    def check(self, where: str = "settings") -> None:
        """Raises ConfigError for the first value outside its limits; `where` as in `from_dict`."""
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            name = _place(where, item.name)
            value = _convert(getattr(self, item.name), hints[item.name], name)
            setattr(self, item.name, value)
            _check_limits(value, item.metadata["_limits"], name)
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"{_place(where, 'validation_fraction')} + test_fraction is "
                f"{self.validation_fraction + self.test_fraction}, but must be < 1"
            )
        if not self.lora_target_modules:
            raise ConfigError(
                f"{_place(where, 'lora_target_modules')} is empty, but must name at least one layer"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _place(where: str, name: str) -> str:
    return f"--{name}" if where == "--" else f"{where}.{name}"


def _convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as the field's type, or ConfigError; never a lossy conversion."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise ConfigError(
                f"{name} is {value!r}, but must be one of {', '.join(map(str, choices))}{hint}"
            )
        return value
    if typing.get_origin(kind) is list:
        return _convert_list(value, name)
    if isinstance(kind, types.UnionType):
        raise TypeError(f"{name}: union types are not supported")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{name} is {value!r}, but must be true or false")
    if kind is str:
        if isinstance(value, str) and value:
            return value
        raise ConfigError(f"{name} is {value!r}, but must be a non-empty text")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{name} is {value!r}, but must be {_kind_name(kind)}")
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}, but must be {_kind_name(kind)}") from None
    except OverflowError:
        raise ConfigError(f"{name} is {value!r}, but must be within ±1e308") from None
    if kind is int:
        if not number.is_integer():
            raise ConfigError(f"{name} is {value!r}, but must be an integer")
        return int(number)
    return number


def _convert_list(value: Any, name: str) -> list[str]:
    if isinstance(value, list) and len(value) == 1 and str(value[0]).startswith("["):
        value = value[0]
    if isinstance(value, str):
        if value.startswith("["):
            try:
                value = json.loads(value.replace("'", '"'))
            except ValueError:  # not JSON, or a number of thousands of digits in it
                raise ConfigError(f"{name} is {value!r}, but must be a list of names") from None
        else:
            value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{name} is {value!r}, but must be a list of names")
    return value


def _kind_name(kind: type) -> str:
    return "an integer" if kind is int else "a number"


def _check_limits(value: Any, limits: Mapping[str, float], name: str) -> None:
    tests = {
        "ge": (">=", lambda limit: value >= limit),
        "gt": (">", lambda limit: value > limit),
        "le": ("<=", lambda limit: value <= limit),
        "lt": ("<", lambda limit: value < limit),
    }
    for key, limit in limits.items():
        sign, holds = tests[key]
        if not holds(limit):
            raise ConfigError(f"{name} is {value!r}, but must be {sign} {limit}")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise ConfigError(f"{name} is {value!r}, but must be finite")
