"""Which trials cannot be told apart from the best one; what several seeds say of a setting.

The mean over tokens is a ratio of sums; its difference between two trials has the standard error of the
linearised ratio (Cochran, Sampling Techniques, section 6): residuals d_i - n_i D of the examples' paired
differences d_i. Holm's correction holds the chance of one wrong "worse" among all of them at 5 %.
"""

import math
import statistics

import numpy as np
from scipy import stats

from sweeps.ledger import SweepRecord, TrialRecord

LEVEL = 0.05


def tied_with_best(record: SweepRecord) -> list[TrialRecord]:
    """The best trial, then those that are not significantly worse, by their loss."""
    best = record.best()
    others = sorted(
        (
            trial
            for trial in record.finished
            if trial.loss is not None and trial.seed_of is None and trial != best
        ),
        key=lambda trial: (trial.loss, trial.number),
    )
    p_values = [worse_p_value(trial, best) for trial in others]
    return [best] + [
        trial for trial, is_worse in zip(others, _holm(p_values), strict=True) if not is_worse
    ]


def worse_p_value(trial: TrialRecord, best: TrialRecord) -> float:
    """One-sided p value of `trial` being worse than `best`; 1 where the two cannot be compared."""
    losses = [
        one.eval_losses(one.result["best_step"]).set_index("example_id") for one in (trial, best)
    ]
    counts = [one["num_tokens"] for one in losses]
    if not losses[0].index.equals(losses[1].index) or not counts[0].equals(counts[1]):
        return 1.0
    difference = (losses[0]["loss_sum"] - losses[1]["loss_sum"]).to_numpy()
    num_tokens = losses[0]["num_tokens"].to_numpy()
    mean = difference.sum() / num_tokens.sum()
    residual = difference - mean * num_tokens
    num = len(residual)
    if num < 2 or not residual.any():
        return 1.0 if mean <= 0 else 0.0
    error = math.sqrt(float(np.square(residual).sum()) * num / (num - 1)) / num_tokens.sum()
    return float(stats.t.sf(mean / error, num - 1))


def _holm(p_values: list[float]) -> list[bool]:
    """Whether each hypothesis is rejected (Holm 1979)."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(np.argsort(p_values)):
        if p_values[index] > LEVEL / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def describe_seeds(record: SweepRecord) -> list[str]:
    """A line for each setting with several seeds: mean, and its t interval of 95 %."""
    lines = []
    for trial in record.finished:
        losses = record.seed_losses(trial)
        if trial.seed_of is None and len(losses) > 1:
            lines.append(
                f"trial {trial.number} {trial.name}: {statistics.mean(losses):.4f} "
                f"± {_half_width(losses):.4f} over {len(losses)} seeds"
            )
    return lines


def _half_width(losses: list[float]) -> float:
    quantile = float(stats.t.ppf(1 - LEVEL / 2, len(losses) - 1))
    return quantile * statistics.stdev(losses) / math.sqrt(len(losses))
