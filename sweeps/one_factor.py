"""OneFactorSampler: a baseline, then one factor moved at a time, last the combination of the best.

The design is read from the order of each factor's `values`, so a definition stays within W&B's
schema: the *centre* takes each factor's middle value (the later of two middle ones), the *baseline*
is the centre trained for the first listed `max_steps` (or the centre, where steps are not varied).
What to try next follows from the study's trials alone, so a rebuilt study continues where it was.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from training.exceptions import SweepError

STEPS = "max_steps"
COMBINATION = "combination"
NAME_ATTR = "name"

Point = dict[str, Any]


class OneFactorSampler(BaseSampler):
    """Sampler of the one-factor-at-a-time design.

    Trials are named by the user attribute `name`: `baseline`, `max_steps=300`, `centre`,
    `combination`. A factor's best value is taken among the finished trials that differ from the
    centre in that factor alone (the mean of repeats); equals go to the centre's value, then to the
    first listed. Failed, pruned and NaN trials count as tried, never as best; a factor without any
    finished trial keeps the centre's value.

    Args:
        factors: the values of every varied setting, in the order to try them; steps come first
            whatever the order, because W&B's server returns parameters sorted by name.
    """

    def __init__(self, factors: Mapping[str, Sequence[Any]]) -> None:
        names = sorted(factors, key=lambda name: name != STEPS)
        self.factors = {name: list(factors[name]) for name in names}
        self.centre: Point = {
            name: values[len(values) // 2] for name, values in self.factors.items()
        }
        self.baseline: Point = dict(self.centre)
        if STEPS in self.factors:
            self.baseline[STEPS] = self.factors[STEPS][0]
        self.design = _design(self.factors, self.baseline, self.centre)
        self._fallback = RandomSampler(seed=0)

    @property
    def num_trials(self) -> int:
        """Trials of the whole design, with the combination."""
        return len(self.design) + 1

    def next_point(self, study: Study, number: int | None = None) -> tuple[str, Point]:
        """Name and factors of the next trial, which may be in the study already as `number`.

        Raises:
            SweepError: only the combination is left, and trials that it needs are still running.
        """
        trials = [trial for trial in study.get_trials(deepcopy=False) if trial.number != number]
        tried = [self._point(trial) for trial in trials]
        for name, point in self.design.items():
            if point not in tried:
                return name, point
        if any(not trial.state.is_finished() for trial in trials):
            raise SweepError(
                "the combination needs the results of the trials that are still running: run one "
                "trial at a time (wandb sweep-scheduler --batch-size 1)"
            )
        return COMBINATION, self.best_combination(study)

    def waits_for_results(self, study: Study) -> bool:
        """Whether only the combination is left, and trials that it needs are still running."""
        trials = study.get_trials(deepcopy=False)
        tried = [self._point(trial) for trial in trials]
        return all(point in tried for point in self.design.values()) and any(
            not trial.state.is_finished() for trial in trials
        )

    def best_combination(self, study: Study) -> Point:
        """Each factor at its best value, by the finished trials."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        finished = [
            (self._point(trial), sign * trial.value)
            for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
            if trial.value is not None and math.isfinite(trial.value)
        ]
        best: Point = {}
        for name, values in self.factors.items():
            scores = []
            for value in values:
                point = {**self.centre, name: value}
                losses = [loss for other, loss in finished if other == point]
                if losses:
                    mean = sum(losses) / len(losses)
                    scores.append((mean, value != self.centre[name], value))
            # min() keeps the first of equals: the centre's value, else the first listed.
            best[name] = (
                min(scores, key=lambda score: score[:2])[2] if scores else self.centre[name]
            )
        return best

    def is_exhausted(self, study: Study) -> bool:
        """Whether nothing is left to try. W&B's scheduler asks this of any sampler that has it."""
        trials = study.get_trials(deepcopy=False)
        tried = [self._point(trial) for trial in trials]
        if not all(point in tried for point in self.design.values()):
            return False
        if not all(trial.state.is_finished() for trial in trials):
            return False
        return self.best_combination(study) in tried

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(values) for name, values in self.factors.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        name, point = self.next_point(study, trial.number)
        study._storage.set_trial_user_attr(trial._trial_id, NAME_ATTR, name)
        trial.set_user_attr(NAME_ATTR, name)  # the copy that the live trial reads
        return dict(point)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        # Only for settings that are no factor, e.g. of a search space that a user adds to.
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _point(self, trial: FrozenTrial) -> Point:
        fixed = trial.system_attrs.get("fixed_params", {})  # a queued trial has no params yet
        params = {**fixed, **trial.params}
        return {name: params[name] for name in self.factors if name in params}


def _design(
    factors: Mapping[str, Sequence[Any]], baseline: Point, centre: Point
) -> dict[str, Point]:
    """Points by name: baseline, then every factor's values around the centre, each point once."""
    design = {"baseline": baseline}
    for name, values in factors.items():
        for value in values:
            point = {**centre, name: value}
            if point not in design.values():
                design["centre" if point == centre else f"{name}={_text(value)}"] = point
    if centre not in design.values():
        design["centre"] = centre
    return design


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
