"""The sweep to run next, as a YAML that `sweeps.run` and `wandb sweep` take as it stands.

A setting whose best value lies at the edge of what was tried is moved on past it, one whose best value lies
inside is looked at more closely, and one that made no detectable difference is fixed: at the best value.
"""

import math
from typing import Any

import yaml

from analysis.load import Results
from analysis.stats import SEED

_CONSTANT_KEYS = ("program", "command", "project", "entity", "metric")
STEP = 2.0
"""Factor to the next value where only one was tried."""


def next_sweep(results: Results, undetected: set[str]) -> str | None:
    """The YAML's text; None for a source that is no sweep, or where nothing is left to try.

    Args:
        results: the sweep.
        undetected: settings whose effect cannot be told from chance.
    """
    if results.sweep is None or results.best.record is None:
        return None
    definition, settings = results.sweep.definition, results.best.record.settings
    parameters: dict[str, Any] = {}
    for name, spec in (definition.get("parameters") or {}).items():
        if "value" in spec:
            parameters[name] = spec
            continue
        value = settings.get(name)
        tried = {
            trial.params.get(name)
            for trial in results.compared
            if _is_number(trial.params.get(name))
        }
        if name != SEED and name not in undetected and isinstance(value, int | float) and tried:
            parameters[name] = {"values": around(value, sorted(tried))}
        else:
            parameters[name] = {"value": value}
    if not any(len(spec.get("values", ())) > 1 for spec in parameters.values()):
        return None
    config = {
        "name": f"{results.name}-next",
        "description": f"What {results.name} leaves open, around its trial {results.best.number}",
        **{key: definition[key] for key in _CONSTANT_KEYS if key in definition},
        "method": "grid",
        "parameters": parameters,
    }
    config.setdefault("metric", {"name": "eval/loss", "goal": "minimize"})
    return yaml.safe_dump(config, sort_keys=False)


def around(best: float, tried: list[Any]) -> list[Any]:
    """Three values: on past the edge where `best` is at one, else halfway to its neighbours.

    Halfway and onward by ratio, as rates, ranks and steps are; whole numbers stay whole.
    """
    position = tried.index(best)
    if len(tried) == 1:
        values = [best / STEP, best, best * STEP]
    elif position == 0:
        ratio = max(tried[1] / best, 1.0 + 1e-9) if best > 0 else STEP
        values = [best / ratio, best / ratio**0.5, best]
    elif position == len(tried) - 1:
        ratio = best / tried[-2] if tried[-2] > 0 else STEP
        values = [best, best * ratio**0.5, best * ratio]
    else:
        values = [_middle(tried[position - 1], best), best, _middle(best, tried[position + 1])]
    if isinstance(best, int):
        values = [max(1, round(value)) for value in values]
    else:
        values = [float(f"{value:.3g}") for value in values]
    return sorted(set(values))


def _middle(low: float, high: float) -> float:
    return math.sqrt(low * high) if low > 0 else (low + high) / 2


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
