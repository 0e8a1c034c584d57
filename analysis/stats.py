"""How sure a comparison is, and what each setting does.

Intervals come from a paired bootstrap over held-out examples (Efron & Tibshirani 1993, ch. 13): trials
are scored on the same examples, so what they share cancels. Resampling alone is too narrow for few
examples, so it is widened after Hesterberg (2015, The American Statistician 69:371). Intervals
say how far the *data* could have moved a difference; another seed may move it further.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, norm, t

from training.exceptions import DataError

MIN_EXAMPLES = 8
"""Of fewer examples the spread is too little known for any interval."""
_RESAMPLED = 0.95
SEED = "seed"


@dataclass(frozen=True)
class Interval:
    """A confidence interval and the estimate in it; without ends below MIN_EXAMPLES examples."""

    low: float
    high: float
    estimate: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is real, as far as the examples can say."""
        return self.low > 0 or self.high < 0


def difference_interval(
    losses_a: pd.DataFrame,
    losses_b: pd.DataFrame,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean loss of `a` minus that of `b`, in nats a token.

    Args:
        losses_a: columns `example_id`, `loss_sum`, `num_tokens`.
        losses_b: the same examples scored by another model.
        confidence: share of intervals that hold the true difference; of the best of m differences,
            `corrected(m)`.
        num_resamples: bootstrap resamples.
        seed: of the resampling.

    Raises:
        DataError: the examples or their numbers of tokens are not the same.
    """
    pairs = losses_a.merge(losses_b, on="example_id", suffixes=("_a", "_b"))
    if not len(pairs) == len(losses_a) == len(losses_b) > 0:
        raise DataError(
            f"losses of {len(losses_a)} and {len(losses_b)} examples have {len(pairs)} in common, "
            "but must be of the same examples"
        )
    if not np.array_equal(pairs["num_tokens_a"], pairs["num_tokens_b"]):
        raise DataError("the examples have other numbers of tokens, but must be the same")
    difference = (pairs["loss_sum_a"] - pairs["loss_sum_b"]).to_numpy()
    return _interval(difference, pairs["num_tokens_a"].to_numpy(), confidence, num_resamples, seed)


def loss_interval(
    losses: pd.DataFrame, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of one model's mean loss, in nats a token; arguments as `difference_interval`."""
    return _interval(
        losses["loss_sum"].to_numpy(),
        losses["num_tokens"].to_numpy(),
        confidence,
        num_resamples,
        seed,
    )


def corrected(num_comparisons: int, confidence: float = 0.95) -> float:
    """Confidence of each of m comparisons such that all hold together with `confidence` (Bonferroni).

    Picking the most extreme of many differences is looking at all of them.
    """
    return 1 - (1 - confidence) / max(1, num_comparisons)


def improvement(loss: float, baseline: float) -> float:
    """How far `loss` is below `baseline`, in percent of it."""
    return 100 * (1 - loss / baseline)


@dataclass(frozen=True)
class Effect:
    """What one setting does, seen only among trials that differ in nothing else."""

    setting: str
    groups: list[dict[Any, int]]
    """Value of the setting -> index of the trial, one dict for each choice of the other settings."""
    spread: float
    """Range of the loss within a group, averaged over groups: what choosing the value is worth."""
    best_value: Any
    """The value that is the best one in most groups; of equals, in the group of the lowest loss."""


def main_effects(
    params: Sequence[dict[str, Any]],
    losses: Sequence[float],
    settings: Sequence[str],
    examples: Sequence[Hashable] | None = None,
) -> list[Effect]:
    """Effect of each setting, the largest first; a setting that no pair of trials isolates is left out.

    Args:
        params: settings by name, one dict a trial.
        losses: loss of each trial.
        settings: names to look at. The seed is none: what it does is noise (`seed_noise`).
        examples: what each trial was scored on; only trials of the same are compared.
    """
    effects = []
    for setting in settings:
        groups = [] if setting == SEED else _groups(setting, params, settings, examples)
        if groups:
            effects.append(_effect(setting, groups, losses))
    return sorted(effects, key=lambda effect: -effect.spread)


@dataclass(frozen=True)
class SeedNoise:
    """How far trials differ that have nothing but another seed."""

    standard_deviation: float
    """Pooled over the choices of the other settings."""
    largest_range: float
    num_trials: int
    num_groups: int
    """Choices of the other settings that were tried with more than one seed."""


def seed_noise(
    params: Sequence[dict[str, Any]],
    losses: Sequence[float],
    settings: Sequence[str],
    examples: Sequence[Hashable] | None = None,
) -> SeedNoise | None:
    """What the seed does to the loss; None if no two trials differ in it alone. As `main_effects`."""
    groups = _groups(SEED, params, settings, examples) if SEED in settings else []
    if not groups:
        return None
    values = [np.array([losses[index] for index in group.values()]) for group in groups]
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in values)
    num_trials = sum(map(len, values))
    return SeedNoise(
        standard_deviation=math.sqrt(squares / (num_trials - len(values))),
        largest_range=max(float(np.ptp(group)) for group in values),
        num_trials=num_trials,
        num_groups=len(values),
    )


def _groups(
    setting: str,
    params: Sequence[dict[str, Any]],
    settings: Sequence[str],
    examples: Sequence[Hashable] | None,
) -> list[dict[Any, int]]:
    """Value of the setting -> index, for trials that differ in nothing else; two at least."""
    groups: dict[Hashable, dict[Any, int]] = {}
    for index, values in enumerate(params):
        others = tuple((name, repr(values.get(name))) for name in settings if name != setting)
        scored_on = examples[index] if examples else None
        # Of trials with the very same settings, the first one stands for them.
        value = values.get(setting)
        value = tuple(value) if isinstance(value, list) else value
        groups.setdefault((others, scored_on), {}).setdefault(value, index)
    return [group for group in groups.values() if len(group) > 1]


def _effect(setting: str, groups: list[dict[Any, int]], losses: Sequence[float]) -> Effect:
    spreads, winners = [], []
    for group in groups:
        in_group = {value: losses[index] for value, index in group.items()}
        spreads.append(max(in_group.values()) - min(in_group.values()))
        winner = min(in_group, key=in_group.__getitem__)
        winners.append((in_group[winner], winner))
    wins = Counter(value for _, value in winners)
    most = [item for item in winners if wins[item[1]] == max(wins.values())]
    best_value = min(most, key=lambda item: item[0])[1]
    return Effect(setting, groups, float(np.mean(spreads)), best_value)


def _interval(
    sums: np.ndarray, num_tokens: np.ndarray, confidence: float, num_resamples: int, seed: int
) -> Interval:
    estimate = float(sums.sum() / num_tokens.sum())
    count = len(sums)
    if count < MIN_EXAMPLES:
        return Interval(-np.inf, np.inf, estimate)
    mean: Callable[..., Any] = lambda total, count, axis: total.sum(axis) / count.sum(axis)  # noqa: E731
    result = bootstrap(
        (sums, num_tokens),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        confidence_level=_RESAMPLED,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = map(float, result.confidence_interval)
    return widened(Interval(low, high, estimate), count, confidence)


def widened(percentiles: Interval, count: int, confidence: float = 0.95) -> Interval:
    """Interval of the wanted confidence from the 2.5th and 97.5th percentiles of resamples of few examples.

    Args:
        percentiles: ends of the middle 95 % of the resamples, and the estimate.
        count: number of examples.
        confidence: of the interval.
    """
    # Percentiles are those of a normal distribution with the variance of these n examples: the true
    # one is n / (n - 1) times that, and only estimated (Student's t). A wanted confidence comes in
    # here too, since far percentiles would need very many resamples.
    quantile = t.ppf((1 + confidence) / 2, count - 1) / norm.ppf((1 + _RESAMPLED) / 2)
    widening = float(quantile * np.sqrt(count / (count - 1)))
    estimate = percentiles.estimate
    return Interval(
        estimate - widening * (estimate - percentiles.low),
        estimate + widening * (percentiles.high - estimate),
        estimate,
    )
