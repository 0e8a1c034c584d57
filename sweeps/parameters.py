"""The `parameters` of a sweep definition: which settings vary, over which values or ranges.

`check_parameters(block, where)` -> a checked specification by setting: numbers that YAML reads as
text converted, every value and every bound tried as a `TrialConfig`.
"""

import contextlib
import difflib
import math
import re
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from training.config import TrialConfig
from training.exceptions import ConfigError, nearest

_PARAMETER_KEYS = ("value", "values", "min", "max", "distribution", "q")

# Distributions of W&B that W&B itself maps to Optuna's, and which keys each takes.
_RANGE_KEYS = {
    "int_uniform": {"min", "max"},
    "uniform": {"min", "max"},
    "log_uniform_values": {"min", "max"},
    "q_uniform": {"min", "max", "q"},
    "q_log_uniform_values": {"min", "max", "q"},
}
_LIST_DISTRIBUTIONS = {"categorical": "values", "constant": "value"}


def listed_values(distribution: BaseDistribution) -> list[Any]:
    """Every value of a list, or of a range with a step, in order; empty for a continuous range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        steps = (distribution.low + index * distribution.step for index in range(count))
        return [min(value, distribution.high) for value in steps]  # 3 * 0.1 is more than 0.3
    return []


def check_parameters(block: Any, where: str, *, grid: bool) -> dict[str, dict[str, Any]]:
    """Checked specifications by setting; `where` is the file and `parameters`.

    Raises:
        ConfigError: a setting is unknown, or no trial could have one of its values.
    """
    if not isinstance(block, dict) or not block:
        raise ConfigError(f"{where} is {block!r}, but must be a mapping of settings")
    known = typing.get_type_hints(TrialConfig)
    parameters: dict[str, dict[str, Any]] = {}
    for key, spec in block.items():
        name, here = str(key), f"{where}.{key}"
        if not isinstance(spec, dict):
            raise ConfigError(f"{here} is {spec!r}, but must be a mapping, e.g. {{value: {spec}}}")
        if "parameters" in spec:
            raise ConfigError(
                f"{here} is a nested group, but must be a setting: `wandb agent` would give it to "
                f"training.run as one option, --{name}"
            )
        check_keys(spec, _PARAMETER_KEYS, here)
        if name not in known:
            raise ConfigError(f"{here} is not a setting{_nearest_setting(name, known)}")
        parameters[name] = _check_parameter(name, spec, here, known[name], grid=grid)
    # Settings are also checked together; a lone bad value has been found above.
    constants = {name: spec["value"] for name, spec in parameters.items() if "value" in spec}
    TrialConfig.from_dict(constants, where)
    return parameters


def as_number(value: Any, where: str) -> int | float:
    """A number; YAML 1.1 reads `2e-4` as text, so text that is a number counts as one."""
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ConfigError(f"{where} is {value!r}, but must be a number")
    try:
        is_number = not math.isnan(number)
    except OverflowError:
        raise ConfigError(f"{where} is {value!r}, but must be within ±1e308") from None
    if not is_number:
        raise ConfigError(f"{where} is {value!r}, but must be a number")
    return number


def check_keys(block: Mapping[Any, Any], keys: tuple[str, ...], where: str) -> None:
    for key in block:
        if key not in keys:
            raise ConfigError(
                f"{where}.{key} is not a key here{nearest(str(key), keys)} ({', '.join(keys)})"
            )


def check_choice(value: Any, choices: tuple[str, ...], where: str) -> None:
    if value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{where} is {value!r}, but must be one of {', '.join(choices)}{hint}")


def _check_parameter(
    name: str, spec: dict[str, Any], where: str, kind: Any, *, grid: bool
) -> dict[str, Any]:
    distribution = spec.get("distribution")
    if distribution is not None:
        check_choice(distribution, (*_LIST_DISTRIBUTIONS, *_RANGE_KEYS), f"{where}.distribution")
    if "value" in spec or "values" in spec:
        key = "value" if "value" in spec else "values"
        check_keys(spec, (key, "distribution"), where)
        if distribution is not None and _LIST_DISTRIBUTIONS.get(distribution) != key:
            raise ConfigError(f"{where}.distribution is {distribution}, but {key} is given")
        if key == "value":
            return {**spec, "value": _checked_value(name, spec["value"], where)}
        return {**spec, "values": _checked_values(name, spec["values"], where)}
    for key in ("min", "max"):
        if key not in spec:
            raise ConfigError(f"{where} has no value, no values, and no {key}")
    return _checked_range(name, spec, where, kind, grid=grid)


def _checked_values(name: str, values: Any, where: str) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}.values is {values!r}, but must be a list of at least one value")
    checked = [_checked_value(name, value, where) for value in values]
    for value in checked:
        if checked.count(value) > 1:
            raise ConfigError(f"{where}.values has {value!r} twice")
    return checked


def _checked_range(
    name: str, spec: dict[str, Any], where: str, kind: Any, *, grid: bool
) -> dict[str, Any]:
    if kind not in (int, float):
        raise ConfigError(f"{where} has min and max, but is not a number: give values")
    numbers = {key: as_number(spec[key], f"{where}.{key}") for key in spec if key != "distribution"}
    spec = {**spec, **numbers}
    low, high = spec["min"], spec["max"]
    if "distribution" not in spec and type(low) is not type(high):
        # W&B's client refuses this too: the bounds' type chooses the distribution.
        raise ConfigError(
            f"{where} has min {low} and max {high}, but both must be integers or both decimals, "
            "or distribution must be given"
        )
    inferred = "int_uniform" if isinstance(low, int) and isinstance(high, int) else "uniform"
    distribution = spec.setdefault("distribution", inferred)
    if distribution not in _RANGE_KEYS:
        raise ConfigError(f"{where}.distribution is {distribution}, but min and max are given")
    if "q" in spec and "q" not in _RANGE_KEYS[distribution]:
        raise ConfigError(f"{where}.q is given, but distribution {distribution} has no steps")
    if low > high:
        raise ConfigError(f"{where}.min is {low}, but must be <= max, which is {high}")
    if not 0 < spec.get("q", 1) < math.inf:
        raise ConfigError(f"{where}.q is {spec['q']}, but must be > 0 and finite")
    if distribution == "q_log_uniform_values" and spec.get("q", 1) != 1:
        # W&B's mapping to Optuna drops any other q: Optuna has no logarithmic scale with steps.
        raise ConfigError(f"{where}.q is {spec['q']}, but must be 1 on a logarithmic scale")
    if "log" in distribution and low <= 0:
        raise ConfigError(f"{where}.min is {low}, but must be > 0 on a logarithmic scale")
    if distribution in ("int_uniform", "q_log_uniform_values") and inferred != "int_uniform":
        raise ConfigError(
            f"{where} has min {low} and max {high}, but {distribution} needs integers"
        )
    if kind is int and not _gives_integers(spec):
        raise ConfigError(
            f"{where}.distribution is {distribution}, but must give integers: int_uniform, or "
            "q_uniform with integer min, max and q"
        )
    if grid and distribution not in ("int_uniform", "q_uniform"):
        raise ConfigError(f"{where}.distribution is {distribution}, but a grid needs values")
    for key in ("min", "max"):
        _checked_value(name, spec[key], where, shown=f"{where}.{key}")
    if distribution == "q_uniform":
        _check_steps(spec, where)
    return spec


def _check_steps(spec: Mapping[str, Any], where: str) -> None:
    """Optuna would lower a max that no number of steps reaches, and say so in a warning only."""
    # Decimal fractions as they are written: 0.3 is three steps of 0.1, which it is not in binary.
    low, high, step = (Fraction(str(spec.get(key, 1))) for key in ("min", "max", "q"))
    if (high - low) % step:
        raise ConfigError(
            f"{where}.max is {spec['max']}, but must be min ({spec['min']}) plus a whole number of "
            f"steps of q ({spec.get('q', 1)}), or it is never tried"
        )


def _gives_integers(spec: Mapping[str, Any]) -> bool:
    """Whether W&B's mapping to Optuna makes an integer distribution of the range."""
    step = spec.get("q", 1)
    if not all(isinstance(number, int) for number in (spec["min"], spec["max"], step)):
        return False
    if spec["distribution"] == "q_log_uniform_values":
        return step == 1
    return spec["distribution"] in ("int_uniform", "q_uniform")


def _checked_value(name: str, value: Any, where: str, shown: str | None = None) -> Any:
    """`value` as the setting's own type; `where` ends in the setting's name."""
    parent = where.removesuffix(f".{name}")
    try:
        return getattr(TrialConfig.from_dict({name: value}, parent), name)
    except ConfigError as error:
        if shown is None:
            raise
        raise ConfigError(str(error).replace(where, shown, 1)) from None


def _nearest_setting(name: str, known: Mapping[str, Any]) -> str:
    # Short names that people use for these settings are too far from them for difflib.
    aliases = {"lr": "learning_rate", "rank": "lora_r", "r": "lora_r", "steps": "max_steps"}
    alias = aliases.get(name.lower())
    if alias and not difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return f"; did you mean {alias!r}?"
    return nearest(name, known)
