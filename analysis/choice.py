"""Who may be the best, how much the choice flatters the winner, and what more seeds would tell.

Everything works on a table of per-example losses, one column a trial, over the same held-out examples: what
trials share cancels. Shapes: N examples, M trials, B resamples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.stats import Interval, widened
from training.exceptions import DataError

NUM_RESAMPLES = 2000
_AT_ONCE = 4_000_000
"""Most numbers of a batch of resamples: memory stays small with many trials."""


@dataclass(frozen=True)
class LossTable:
    """Losses of M trials on the same N examples."""

    sums_NM: np.ndarray
    """Nats of each example's supervised tokens."""
    tokens_N: np.ndarray

    @property
    def losses(self) -> np.ndarray:
        """Nats a token, as `eval/loss`."""
        return self.sums_NM.sum(0) / self.tokens_N.sum()

    @classmethod
    def of(cls, losses: Sequence[pd.DataFrame]) -> "LossTable":
        """Aligns frames with the columns `example_id`, `loss_sum`, `num_tokens`.

        Raises:
            DataError: they are not of the same examples.
        """
        frames = [frame.set_index("example_id").sort_index() for frame in losses]
        first = frames[0]
        for frame in frames[1:]:
            same = frame.index.equals(first.index)
            if not same or not np.array_equal(frame["num_tokens"], first["num_tokens"]):
                raise DataError("losses are of other examples, but must be of the same")
        sums = np.stack([frame["loss_sum"].to_numpy(float) for frame in frames], axis=1)
        return cls(sums, first["num_tokens"].to_numpy(float))

    def draws(self, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
        """How often each example is in each of `num_resamples` draws with replacement, batches of BxN."""
        rng = np.random.default_rng(seed)
        count, num_trials = self.sums_NM.shape
        batch = max(1, _AT_ONCE // max(count, num_trials))
        for start in range(0, num_resamples, batch):
            size = min(batch, num_resamples - start)
            yield rng.multinomial(count, np.full(count, 1 / count), size=size).astype(float)

    def resampled(self, num_resamples: int, seed: int) -> np.ndarray:
        """Losses of `num_resamples` draws of the examples, BxM."""
        parts = [
            (weights_BN @ self.sums_NM) / (weights_BN @ self.tokens_N)[:, None]
            for weights_BN in self.draws(num_resamples, seed)
        ]
        return np.concatenate(parts)


def chances_to_be_best(
    table: LossTable, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """p-value, M of them, of "this trial is the best one": multiple comparisons with the best.

    A trial is refused if some other one beats it by more than chance lets the largest of all such differences
    be (Hsu 1984, Annals of Statistics 12:1136). Differences are studentised, and so are those of the paired
    bootstrap that says what chance does (Efron & Tibshirani 1993, ch. 12): the trials' correlation and their
    skewness count. Whatever the number of trials, the truly best one is refused at p < 0.05 in about 5 % of
    studies at most (docs/statistics.md has the measured rates).
    """
    num_trials = table.sums_NM.shape[1]
    if num_trials == 1:
        return np.ones(1)
    ones_1N = np.ones((1, len(table.tokens_N)))
    exceeded = np.zeros(num_trials)
    observed = [_differences(table, trial, ones_1N) for trial in range(num_trials)]
    largest = [(difference / error).max() for difference, error in observed]
    for weights_BN in table.draws(num_resamples, seed):
        for trial, (estimate, _) in enumerate(observed):
            difference, error = _differences(table, trial, weights_BN)
            exceeded[trial] += (((difference - estimate) / error).max(1) >= largest[trial]).sum()
    return (1 + exceeded) / (1 + num_resamples)


def _differences(
    table: LossTable, trial: int, weights_BN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The trial's loss minus each other one's, and its standard error: both Bx(M-1)."""
    differences_NM = np.delete(table.sums_NM[:, [trial]] - table.sums_NM, trial, axis=1)
    tokens_N = table.tokens_N[:, None]
    total_B1 = weights_BN @ tokens_N
    ratio_BM = (weights_BN @ differences_NM) / total_B1
    # Of the residuals difference - ratio * tokens: the linearised variance of a ratio (Cochran 1977, 6.4).
    squares_BM = (
        weights_BN @ differences_NM**2
        - 2 * ratio_BM * (weights_BN @ (differences_NM * tokens_N))
        + ratio_BM**2 * (weights_BN @ tokens_N**2)
    )
    return ratio_BM, np.sqrt(np.maximum(squares_BM, 1e-24)) / total_B1


def optimism(table: LossTable, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> float:
    """By how much the lowest of M losses is too low for having been chosen, nats a token.

    The mean over resamples of how far the resample's winner is better there than on all examples (Efron 1983,
    JASA 78:316). Where trials are nearly equal it is too low by a third or so (docs/statistics.md).
    """
    resampled_BM = table.resampled(num_resamples, seed)
    winners_B = resampled_BM.argmin(1)
    there_B = resampled_BM[np.arange(len(winners_B)), winners_B]
    return float((table.losses[winners_B] - there_B).mean())


def loss_intervals(
    table: LossTable, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[Interval]:
    """95 % interval of each trial's own loss, M of them.

    They hold how hard the examples are, which all trials share: two that overlap may well differ.
    """
    low_M, high_M = np.percentile(table.resampled(num_resamples, seed), [2.5, 97.5], axis=0)
    count = len(table.tokens_N)
    ends = zip(low_M, high_M, table.losses, strict=True)
    return [widened(Interval(float(a), float(b), float(c)), count) for a, b, c in ends]


@dataclass(frozen=True)
class SeedSummary:
    """A setting trained with several seeds."""

    mean: float
    low: float
    """Of the 95 % interval of the mean over seeds (Student's t)."""
    high: float
    standard_deviation: float
    num_seeds: int


def summarize_seeds(losses: Sequence[float]) -> SeedSummary:
    """Mean over seeds with its interval; needs two seeds at least.

    Raises:
        DataError: of fewer than two losses.
    """
    if len(losses) < 2:
        raise DataError(f"{len(losses)} seeds are too few for an interval, but must be >= 2")
    mean, deviation = float(np.mean(losses)), float(np.std(losses, ddof=1))
    half = float(stats.t.ppf(0.975, len(losses) - 1)) * deviation / math.sqrt(len(losses))
    return SeedSummary(mean, mean - half, mean + half, deviation, len(losses))


def seeds_needed(
    difference: float, standard_deviation: float, power: float = 0.8, confidence: float = 0.95
) -> int | None:
    """Seeds of each of two settings such that a t test tells them apart with probability `power`.

    Args:
        difference: of their mean losses.
        standard_deviation: between seeds of one setting.
        power: wanted.
        confidence: of the test, two-sided.

    Returns:
        The number, at least 2; None beyond 1,000.
    """
    if difference == 0:
        return None
    effect = abs(difference) / max(standard_deviation, 1e-12)
    for number in range(2, 1001):
        freedom = 2 * (number - 1)
        noncentrality = effect * math.sqrt(number / 2)
        critical = stats.t.isf((1 - confidence) / 2, freedom)
        reached = stats.nct.sf(critical, freedom, noncentrality)
        if math.isnan(reached) or reached >= power:  # scipy's nct gives up where it is certain
            return number
    return None
