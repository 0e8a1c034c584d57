"""What is asked of a sweep from outside its process: stop a trial, add seeds, train one more setting.

The dashboard writes a file into the sweep's `requests/`; the runner (`sweeps.asked`) puts it into the study
and removes it, so that one process alone writes the study. Requests wait for the next start where nobody
runs the sweep.
"""

import contextlib
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.directory import is_locked
from sweeps.ledger import TrialRecord, read_trial
from sweeps.parameters import as_number
from sweeps.spec import SweepDefinition, read_definition
from training.exceptions import ConfigError, SweepError
from training.paths import SweepPaths, read_json, write_json

STOP_TRIAL, ADD_SEEDS, QUEUE_SETTING = "stop_trial", "add_seeds", "queue_setting"
MOST_SEEDS = 100


def stop_trial(paths: SweepPaths, number: int) -> None:
    """The trial ends at its next evaluation, as pruned.

    Raises:
        SweepError: there is no such trial, or it has ended.
    """
    trial = _trial(paths, number)
    if trial.result:
        raise SweepError(f"{trial.paths.root}: the trial is {trial.state} already")
    if read_json(trial.paths.config).get("engine") == "trl":
        raise SweepError(f"{trial.paths.root}: a trial of --engine trl cannot be stopped")
    _write(paths, STOP_TRIAL, number=number)


def add_seeds(paths: SweepPaths, numbers: Sequence[int], num_seeds: int) -> None:
    """Each of these trials is trained with `num_seeds` further seeds.

    Raises:
        ConfigError: `num_seeds` is none.
        SweepError: one of them is not there or not complete; nothing is asked for then.
    """
    if not 1 <= num_seeds <= MOST_SEEDS:
        raise ConfigError(f"num_seeds is {num_seeds}, but must be from 1 to {MOST_SEEDS}")
    firsts = []
    for number in numbers:
        trial = _trial(paths, number)
        if trial.state != "complete":
            raise SweepError(
                f"{trial.paths.root}: the trial is {trial.state}, but must be complete"
            )
        firsts.append(number if trial.seed_of is None else trial.seed_of)
    _write(paths, ADD_SEEDS, numbers=list(dict.fromkeys(firsts)), num_seeds=num_seeds)


def queue_setting(paths: SweepPaths, params: Mapping[str, Any]) -> None:
    """A setting of the sweep's search space, trained next.

    Args:
        paths: the sweep's directory.
        params: a value for every setting that the sweep varies; text that is a number counts as one.

    Raises:
        ConfigError: one is missing, is not varied, or has a value outside the definition.
    """
    definition = read_definition(paths.definition)
    _write(paths, QUEUE_SETTING, params=_checked_params(definition, params))


def pending_requests(paths: SweepPaths) -> list[dict[str, Any]]:
    """Requests that are not in the study yet, oldest first: `id`, `action`, `time` (unix s), arguments."""
    found = []
    for path in sorted(paths.requests.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # taken at this moment, or nobody's
            request = read_json(path)
            if isinstance(request, dict) and "action" in request:
                found.append({**request, "id": path.stem})
    return found


def settle_request(paths: SweepPaths, request: Mapping[str, Any]) -> None:
    """The request is in the study."""
    (paths.requests / f"{request['id']}.json").unlink(missing_ok=True)


def is_running(paths: SweepPaths) -> bool:
    """Whether a process runs the sweep now; else requests wait for its next start."""
    return is_locked(paths)


def _write(paths: SweepPaths, action: str, **arguments: Any) -> None:
    now = time.time()
    name = f"{int(now * 1e9)}-{uuid.uuid4().hex[:8]}"
    write_json(paths.requests / f"{name}.json", {"action": action, "time": now, **arguments})


def _trial(paths: SweepPaths, number: int) -> TrialRecord:
    trial = paths.trial(number)
    if not trial.config.is_file():
        raise SweepError(f"{trial.root}: no such trial")
    return read_trial(trial)


def _checked_params(definition: SweepDefinition, params: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{definition.path}: parameters"
    varied = definition.varied
    for name in params:
        if name not in varied:
            raise ConfigError(f"{where}.{name} is not varied by this sweep ({', '.join(varied)})")
    for name in varied:
        if name not in params:
            raise ConfigError(f"{where}.{name} is missing")
    config = definition.trial_config({name: _read(params[name]) for name in varied})
    checked = {name: getattr(config, name) for name in varied}
    return {
        name: _in_space(value, varied[name], f"{where}.{name}") for name, value in checked.items()
    }


def _read(value: Any) -> Any:
    """A form's text as what YAML would have read: numbers, true, false, lists."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):
        return json.loads(value)
    return value


def _in_space(value: Any, spec: Mapping[str, Any], where: str) -> Any:
    """The value as the definition's distribution has it."""
    if "values" in spec:
        if value not in spec["values"]:
            shown = ", ".join(map(str, spec["values"]))
            raise ConfigError(f"{where} is {value}, but must be one of {shown}")
        return value
    number, low, high = as_number(value, where), spec["min"], spec["max"]
    if not low <= number <= high:
        raise ConfigError(f"{where} is {value}, but must be from {low} to {high}")
    if "q" not in spec:
        return value
    steps = (number - low) / spec["q"]
    if not math.isclose(steps, round(steps), abs_tol=1e-9):
        raise ConfigError(f"{where} is {value}, but must be {low} plus steps of {spec['q']}")
    # As `listed_values` has it, to the last bit: a grid looks its points up.
    return min(low + round(steps) * spec["q"], high)
