"""Trials put into a study for its next ask: retries, further seeds, settings that somebody asked for.

A waiting trial carries its settings as Optuna's `fixed_params`, which the study hands out before it asks its
sampler, and in its user attributes what it is there for.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.samplers import GridSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeps.one_factor import COMBINATION, NAME_ATTR

RETRY_ATTR = "retry_of"
CONTINUES_ATTR = "continues"
"""Number of the trial whose files a retry goes on with, since its process was lost."""
ORIGIN_ATTR = "origin"
"""Number of the first of trials that continue each other; they share one W&B run."""
SEED_OF_ATTR = "seed_of"
SEED_ATTR = "seed"
REQUEST_ATTR = "request"
"""Id of the request that the trial answers; such a trial does not count towards the sweep's number."""
_GRID_ATTRS = ("grid_id", "search_space")


def further_seed(trial: FrozenTrial, seed: int, request: str | None = None) -> FrozenTrial:
    """A waiting copy of the trial that is going to be trained with another seed."""
    kept = {key: trial.user_attrs[key] for key in (NAME_ATTR,) if key in trial.user_attrs}
    attrs = {**kept, SEED_OF_ATTR: trial.number, SEED_ATTR: seed}
    if request is not None:
        attrs[REQUEST_ATTR] = request
    return _waiting_copy(trial, trial.params, attrs)


def retry(trial: FrozenTrial) -> FrozenTrial:
    """A waiting copy of a failed trial."""
    # The combination is made anew: retries before it may have changed what is best.
    params = {} if is_combination(trial) else _params(trial)
    return _waiting_copy(trial, params, {**_identity(trial), RETRY_ATTR: trial.number})


def continuation(trial: FrozenTrial) -> FrozenTrial:
    """A waiting copy of a trial whose process was lost, which goes on from its last saved state."""
    number = trial.number
    origin = trial.user_attrs.get(ORIGIN_ATTR, number)
    attrs = {RETRY_ATTR: number, CONTINUES_ATTR: number, ORIGIN_ATTR: origin}
    return _waiting_copy(trial, _params(trial), {**_identity(trial), **attrs})


def continued(trials: Sequence[FrozenTrial], number: int) -> list[int]:
    """Numbers of the trials that this one goes on with: the last one first."""
    chain = []
    while (before := trials[number].user_attrs.get(CONTINUES_ATTR)) is not None:
        chain.append(before)
        number = before
    return chain


def asked_setting(study: optuna.Study, params: Mapping[str, Any], request: str) -> FrozenTrial:
    """A waiting trial with these values of the varied settings; on a grid it is that grid's point."""
    fixed = {
        name: json.dumps(value) if isinstance(value, list) else value
        for name, value in params.items()
    }
    return create_trial(
        state=TrialState.WAITING,
        system_attrs={**_grid_point(study, fixed), "fixed_params": fixed},
        user_attrs={REQUEST_ATTR: request},
    )


def seeds_of(trials: Sequence[FrozenTrial], number: int) -> list[FrozenTrial]:
    """Further seeds of a trial, without those that another one continues."""
    continued = {trial.user_attrs.get(CONTINUES_ATTR) for trial in trials}
    return [
        trial
        for trial in trials
        if trial.user_attrs.get(SEED_OF_ATTR) == number and trial.number not in continued
    ]


def is_further_seed(info: Mapping[str, Any] | None) -> bool:
    """Whether a job is there to measure the spread between seeds; `info` is its own."""
    return (info or {}).get("seed_of") is not None


def is_combination(trial: FrozenTrial) -> bool:
    """Whether the sampler has made it of the others' results; its further seeds have its settings."""
    attrs = trial.user_attrs
    return attrs.get(NAME_ATTR) == COMBINATION and SEED_OF_ATTR not in attrs


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """Its settings; one that was lost before all were drawn has some of them fixed only."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _identity(trial: FrozenTrial) -> dict[str, Any]:
    names = (NAME_ATTR, SEED_OF_ATTR, SEED_ATTR, REQUEST_ATTR)
    return {name: trial.user_attrs[name] for name in names if name in trial.user_attrs}


def _grid_point(study: optuna.Study, params: Mapping[str, Any]) -> dict[str, Any]:
    sampler = study.sampler
    if not isinstance(sampler, GridSampler):
        return {}
    names = list(sampler._search_space)
    grid = [dict(zip(names, point, strict=True)) for point in sampler._all_grids]
    return {"grid_id": grid.index(dict(params)), "search_space": sampler._search_space}


def _waiting_copy(
    trial: FrozenTrial, params: dict[str, Any], user_attrs: dict[str, Any]
) -> FrozenTrial:
    """To be added to the study, which hands it out next. GridSampler needs its own attributes on it."""
    grid = {key: trial.system_attrs[key] for key in _GRID_ATTRS if key in trial.system_attrs}
    return create_trial(
        state=TrialState.WAITING,
        system_attrs={**grid, "fixed_params": params},
        user_attrs=user_attrs,
    )
