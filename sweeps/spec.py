"""Reads and checks a sweep definition: a YAML that `wandb sweep` accepts as it stands.

`read_definition(path)` -> `SweepDefinition`. What W&B would only warn about on its server, or a
trial would refuse hours later, is an error here: one line with the file, the key and its value.
Every listed value and every bound is tried as a `TrialConfig`, so what passes can be trained.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sweeps.ledger import METRIC
from sweeps.parameters import as_number, check_choice, check_keys, check_parameters
from training.config import TrialConfig
from training.exceptions import ConfigError, nearest

METHODS = ("grid", "random", "bayes", "custom")

# The keys of W&B's schema; those that stand for something we do not run have no reader below.
_KEYS = {
    "apiVersion": str,
    "kind": str,
    "program": str,
    "command": list,
    "method": str,
    "metric": dict,
    "parameters": dict,
    "early_terminate": dict,
    "run_cap": int,
    "name": str,
    "description": str,
    "project": str,
    "entity": str,
    "scheduler": dict,
}
_REQUIRED_KEYS = ("method", "parameters")
_METRIC_KEYS = ("name", "goal", "target", "impute", "impute_while_running")
_SCHEDULER_KEYS = ("engine", "source", "optimizer")
_EARLY_TERMINATE_KEYS = {
    "hyperband": ("min_iter", "max_iter", "s", "eta", "strict"),
    "asha": ("min_iter", "eta", "s", "strict"),
    "hyperband_brackets": ("min_iter", "max_iter", "eta", "strict"),
    "median": ("min_iter", "min_trials", "strict"),
    "percentile": ("percentile", "min_iter", "min_trials", "strict"),
    "patient": ("patience", "min_delta"),
    "wilcoxon": ("min_iter", "p_threshold"),
}
"""Keys of each type; W&B's server knows the first alone."""
_EARLY_TERMINATE_REQUIRED = {
    "asha": ("min_iter",),
    "hyperband_brackets": ("min_iter", "max_iter"),
    "percentile": ("percentile",),
    "patient": ("patience",),
}
_EARLY_TERMINATE_LEAST = {
    "min_iter": 1,
    "max_iter": 1,
    "s": 1,
    "eta": 2,
    "min_trials": 1,
    "patience": 1,
}
_EARLY_TERMINATE_LEAST_OF = {
    "asha": {"s": 0},  # Optuna's min_early_stopping_rate
    "hyperband_brackets": {"min_iter": 2},  # value 1 is the base model's, the same for all trials
}
_EARLY_TERMINATE_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "percentile": (lambda value: 0 < value < 100, "> 0 and < 100"),
    "p_threshold": (lambda value: 0 < value < 1, "> 0 and < 1"),
    "min_delta": (lambda value: 0 <= value < math.inf, ">= 0 and finite"),
}
_TYPE_NAMES = {str: "a text", list: "a list", dict: "a mapping", int: "an integer"}


@dataclass(frozen=True)
class SweepDefinition:
    """A checked definition."""

    path: Path
    text: str
    """The file as it was given."""
    config: dict[str, Any]
    """The YAML's content; numbers written as text are numbers."""

    @property
    def name(self) -> str:
        return self.config.get("name") or self.path.stem

    @property
    def method(self) -> str:
        return self.config["method"]

    @property
    def run_cap(self) -> int | None:
        return self.config.get("run_cap")

    @property
    def target(self) -> float | None:
        """The sweep ends once a trial's metric is this low."""
        return self.config.get("metric", {}).get("target")

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        return self.config["parameters"]

    @property
    def constants(self) -> dict[str, Any]:
        """Settings with one `value`."""
        return {name: spec["value"] for name, spec in self.parameters.items() if "value" in spec}

    @property
    def varied(self) -> dict[str, dict[str, Any]]:
        """Specifications of the settings that the sweep varies, in the file's order."""
        return {name: spec for name, spec in self.parameters.items() if "value" not in spec}

    def trial_config(self, params: Mapping[str, Any]) -> TrialConfig:
        """Settings of the trial that has `params` for the varied settings."""
        return TrialConfig.from_dict({**self.constants, **params}, f"{self.path}: parameters")

    def difference(self, other: "SweepDefinition") -> str | None:
        """First key in which the two would run different trials, or None."""
        for key in ("method", "metric", "scheduler", "early_terminate"):
            if self.config.get(key) != other.config.get(key):
                return key
        for name in [*self.parameters, *other.parameters]:
            if self.parameters.get(name) != other.parameters.get(name):
                return f"parameters.{name}"
        return None


def read_definition(path: str | Path) -> SweepDefinition:
    """Reads and checks the sweep definition in `path`.

    Raises:
        ConfigError: the file cannot be read, or one of its keys or values is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read as a sweep definition: {reason}") from None
    return check_definition(_load_yaml(text, path), text, path)


def check_definition(config: dict[str, Any], text: str, path: Path) -> SweepDefinition:
    """Checks a definition's content, which `path` names in errors.

    Raises:
        ConfigError: one of its keys or values is wrong.
    """
    _check_top_level(config, path)
    _check_metric(config, path)
    _check_scheduler(config, path)
    _check_early_terminate(config, path)
    config["parameters"] = check_parameters(
        config["parameters"], f"{path}: parameters", grid=config["method"] == "grid"
    )
    return SweepDefinition(path, text, config)


class _UniqueKeyLoader(yaml.SafeLoader):
    """`yaml.safe_load` that refuses a key given twice instead of keeping the last."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, OverflowError) as error:
            # What looks like a date or a number and is none (2026-02-30): PyYAML leaves Python's error.
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from None


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable) or key_node.tag == "tag:yaml.org,2002:merge":
            continue  # the first is refused below, the second may stand twice
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return yaml.constructor.BaseConstructor.construct_mapping(loader, node, deep=True)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _load_yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}: {line}not valid YAML: {problem}") from None
    if not config:
        raise ConfigError(f"{path}: is empty, but must be a sweep definition")
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: is {_type_name(config)}, but must be a mapping of keys")
    return config


def _check_top_level(config: dict[str, Any], path: Path) -> None:
    for key, value in config.items():
        if key == "metrics":
            raise ConfigError(f"{path}: metrics is not supported, but metric is (one objective)")
        if key not in _KEYS:
            raise ConfigError(f"{path}: {key} is not a key of a sweep{nearest(str(key), _KEYS)}")
        kind = _KEYS[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{path}: {key} is {value!r}, but must be {_TYPE_NAMES[kind]}")
        if not value and kind is not int:
            raise ConfigError(f"{path}: {key} is empty")
    for key in _REQUIRED_KEYS:
        if key not in config:
            raise ConfigError(f"{path}: {key} is missing")
    check_choice(config["method"], METHODS, f"{path}: method")
    if config.get("run_cap", 1) < 1:
        raise ConfigError(f"{path}: run_cap is {config['run_cap']}, but must be >= 1")
    name = config.get("name", path.stem)
    if "/" in name or "\\" in name or name.startswith(".") or name != name.strip():
        raise ConfigError(
            f"{path}: name is {name!r}, but must be usable as a directory's name (no slash, "
            "no dot in front, no space around)"
        )
    if not all(isinstance(word, str) for word in config.get("command", [])):
        raise ConfigError(f"{path}: command must be a list of texts")


def _check_metric(config: dict[str, Any], path: Path) -> None:
    metric = config.get("metric")
    if metric is None:
        if config["method"] == "bayes" or "early_terminate" in config:
            raise ConfigError(
                f"{path}: metric is missing, but method bayes and early_terminate need one "
                f"(name: {METRIC}, goal: minimize)"
            )
        return
    check_keys(metric, _METRIC_KEYS, f"{path}: metric")
    if metric.get("name") != METRIC:
        raise ConfigError(f"{path}: metric.name is {metric.get('name')!r}, but must be {METRIC!r}")
    if metric.get("goal", "minimize") != "minimize":
        raise ConfigError(f"{path}: metric.goal is {metric['goal']!r}, but must be 'minimize'")
    if "target" in metric:
        metric["target"] = as_number(metric["target"], f"{path}: metric.target")


def _check_scheduler(config: dict[str, Any], path: Path) -> None:
    scheduler = config.get("scheduler")
    if scheduler is None:
        if config["method"] == "custom":
            raise ConfigError(f"{path}: method is 'custom', but then scheduler must be given")
        return
    where = f"{path}: scheduler"
    check_keys(scheduler, _SCHEDULER_KEYS, where)
    if scheduler.get("engine") != "optuna":
        raise ConfigError(f"{where}.engine is {scheduler.get('engine')!r}, but must be 'optuna'")
    for key in ("source", "optimizer"):
        if not isinstance(scheduler.get(key), str):
            raise ConfigError(f"{where}.{key} is {scheduler.get(key)!r}, but must be a text")
    # W&B's own rules for engine optuna.
    if config["method"] != "custom":
        raise ConfigError(
            f"{path}: method is {config['method']!r}, but must be 'custom' with scheduler.engine "
            "optuna (the study decides)"
        )
    if "early_terminate" in config:
        raise ConfigError(
            f"{path}: early_terminate cannot be used with scheduler; give the study a pruner"
        )


def _check_early_terminate(config: dict[str, Any], path: Path) -> None:
    block = config.get("early_terminate")
    if block is None:
        return
    where = f"{path}: early_terminate"
    kind, kinds = block.get("type"), tuple(_EARLY_TERMINATE_KEYS)
    if kind not in kinds:
        raise ConfigError(
            f"{where}.type is {kind!r}, but must be one of {', '.join(kinds)} (W&B's server knows "
            f"hyperband alone){nearest(str(kind), kinds)}"
        )
    check_keys(block, ("type", *_EARLY_TERMINATE_KEYS[kind]), where)
    if kind == "hyperband":
        if ("min_iter" in block) == ("max_iter" in block):
            raise ConfigError(f"{where} must have min_iter, or max_iter and s, and not both")
        if "max_iter" in block and "s" not in block:
            raise ConfigError(f"{where}.s is missing, but max_iter needs it")
    for key in _EARLY_TERMINATE_REQUIRED.get(kind, ()):
        if key not in block:
            raise ConfigError(f"{where}.{key} is missing, but type {kind} needs it")
    for key, least in (_EARLY_TERMINATE_LEAST | _EARLY_TERMINATE_LEAST_OF.get(kind, {})).items():
        value = block.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{where}.{key} is {value!r}, but must be an integer >= {least}")
    if kind == "hyperband_brackets" and block["max_iter"] < block["min_iter"]:
        raise ConfigError(
            f"{where}.max_iter is {block['max_iter']}, but must be >= min_iter, which is "
            f"{block['min_iter']}"
        )
    if not isinstance(block.get("strict", False), bool):
        raise ConfigError(f"{where}.strict is {block['strict']!r}, but must be true or false")
    for key in _EARLY_TERMINATE_NUMBERS.keys() & block.keys():
        holds, limits = _EARLY_TERMINATE_NUMBERS[key]
        block[key] = as_number(block[key], f"{where}.{key}")
        if not holds(block[key]):
            raise ConfigError(f"{where}.{key} is {block[key]!r}, but must be {limits}")


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), f"{value!r}")
