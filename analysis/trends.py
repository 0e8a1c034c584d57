"""What the settings do, over all trials: importance, the value of more steps, what is worth its cost.

`importances` asks Optuna's evaluators, `steps_trend` fits a power law to trials that differ in steps alone,
`pareto_front` keeps the trials that no other one beats in everything.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import (
    FanovaImportanceEvaluator,
    PedAnovaImportanceEvaluator,
    get_param_importances,
)

from analysis.choice import NUM_RESAMPLES, LossTable
from analysis.interactions import are_numbers, levels_of

MIN_TRIALS = 6
"""Of fewer trials no importance is told."""
NUM_FORESTS = 8
NUM_RANGES = 10
"""A number of more values is cut into so many ranges: beyond, forests take minutes and tell no more."""
_EXPONENTS = np.geomspace(0.05, 3.0, 60)
MIN_LENGTHS = 4
"""Of fewer numbers of steps a power law's three constants say nothing."""


@dataclass(frozen=True)
class Importance:
    """Share of the loss's variance over the space that a setting explains alone."""

    setting: str
    fanova: float
    """Functional ANOVA (Hutter et al. 2014), mean over random forests."""
    fanova_spread: float
    """Standard deviation over the forests: what is below it says nothing."""
    ped_anova: float
    """PED-ANOVA (Watanabe et al. 2023): what tells the better half from the rest."""


def importances(
    params: Sequence[dict[str, Any]], losses: Sequence[float], settings: Sequence[str]
) -> list[Importance]:
    """Importance of each setting that varies, the largest first; none of fewer than MIN_TRIALS trials.

    Args:
        params: settings by name, one dict a trial.
        losses: loss of each trial.
        settings: names to look at.
    """
    values = {name: _values([point.get(name) for point in params]) for name in settings}
    varied = [name for name, chosen in values.items() if len(set(chosen)) > 1]
    if len(params) < MIN_TRIALS or len(varied) < 2:
        return []
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        spaces = {name: _space(values[name]) for name in varied}
        for index, loss in enumerate(losses):
            chosen = {name: values[name][index] for name in varied}
            study.add_trial(
                optuna.trial.create_trial(params=chosen, distributions=spaces, value=loss)
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            forests = [
                get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
                for seed in range(NUM_FORESTS)
            ]
            ped = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.5)
            )
    finally:
        optuna.logging.set_verbosity(verbosity)
    found = [
        Importance(
            setting=name,
            fanova=float(np.mean([forest[name] for forest in forests])),
            fanova_spread=float(np.std([forest[name] for forest in forests])),
            ped_anova=float(ped.get(name, 0.0)),
        )
        for name in varied
    ]
    return sorted(found, key=lambda importance: -importance.fanova)


def _values(values: Sequence[Any]) -> list[Any]:
    """Numbers by their order, so that near ones are near to a forest; others as text, which Optuna stores."""
    if are_numbers(values):
        return [int(level) for level in levels_of(np.asarray(values, float), NUM_RANGES)]
    return [repr(value) for value in values]


def _space(values: Sequence[Any]) -> BaseDistribution:
    # Categories have a column each, and a forest's marginals take time exponential in their number.
    if isinstance(values[0], int):
        return IntDistribution(0, max(values))
    return CategoricalDistribution(sorted(set(values)))


@dataclass(frozen=True)
class StepsTrend:
    """`floor + scale * steps ** -exponent`, fitted to trials that differ in steps alone."""

    steps: list[int]
    losses: list[float]
    floor: float
    scale: float
    exponent: float
    doubled_steps: int
    """Twice the most steps that were tried."""
    gain: float
    """What doubling would take off the loss, nats a token: an extrapolation."""
    gain_low: float
    """Of the 95 % interval over resampled examples; the law itself may be wrong beyond it."""
    gain_high: float

    def predict(self, steps: float | np.ndarray) -> Any:
        return self.floor + self.scale * np.asarray(steps, float) ** -self.exponent


def steps_trend(
    steps: Sequence[int], table: LossTable, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> StepsTrend | None:
    """The trend over M numbers of steps, whose per-example losses are the table's columns.

    Each resample of the examples is fitted anew. None of fewer than MIN_LENGTHS numbers of steps.
    """
    if len(set(steps)) < MIN_LENGTHS:
        return None
    order = np.argsort(steps)
    steps_M = np.asarray(steps, float)[order]
    losses_BM = np.concatenate([table.losses[None], table.resampled(num_resamples, seed)])
    floor_B, scale_B, exponent_B = _fit(steps_M, losses_BM[:, order])
    most = steps_M[-1]
    gain_B = scale_B * (most**-exponent_B - (2 * most) ** -exponent_B)
    low, high = np.percentile(gain_B[1:], [2.5, 97.5])
    return StepsTrend(
        steps=[int(step) for step in steps_M],
        losses=[float(loss) for loss in losses_BM[0, order]],
        floor=float(floor_B[0]),
        scale=float(scale_B[0]),
        exponent=float(exponent_B[0]),
        doubled_steps=int(2 * most),
        gain=float(gain_B[0]),
        gain_low=float(low),
        gain_high=float(high),
    )


def _fit(steps_M: np.ndarray, losses_BM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares: for each exponent a straight line in steps ** -exponent, then the best exponent."""
    best_B = np.full(len(losses_BM), np.inf)
    floor_B, scale_B, exponent_B = (np.zeros(len(losses_BM)) for _ in range(3))
    means_B = losses_BM.mean(1)
    for exponent in _EXPONENTS:
        power_M = steps_M**-exponent
        deviation_M = power_M - power_M.mean()
        scale = np.maximum(losses_BM @ deviation_M / (deviation_M @ deviation_M), 0.0)
        floor = means_B - scale * power_M.mean()
        error = ((losses_BM - floor[:, None] - scale[:, None] * power_M) ** 2).sum(1)
        better = error < best_B
        best_B[better], floor_B[better] = error[better], floor[better]
        scale_B[better], exponent_B[better] = scale[better], exponent
    return floor_B, scale_B, exponent_B


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the points that no other one is at least as low as in everything, in order of the first.

    Of equal points the first is kept.
    """
    front = []
    for index, point in enumerate(points):
        is_beaten = any(
            all(a <= b for a, b in zip(other, point, strict=True))
            and (tuple(other) != tuple(point) or number < index)
            for number, other in enumerate(points)
            if number != index
        )
        if not is_beaten:
            front.append(index)
    return sorted(front, key=lambda index: points[index])
