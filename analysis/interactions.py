"""Which pairs of settings act together: what one does depends on the value of the other.

Analysis of variance: each setting has its own effect at every value; a pair of numbers has one constant more,
how far the slope of one changes along the other, and a pair with a setting that is no number one a choice.
A pair counts if leaving it out makes the fit worse than chance would (F test), corrected for the number of
pairs (Bonferroni). Shapes: M trials.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import f as f_distribution

MIN_TRIALS = 20
"""Of fewer trials no interaction is told."""
MIN_FREE = 5
"""Trials beyond the constants of the fit; with fewer the noise is not known."""
NUM_LEVELS = 5
"""A number of more values has so many ranges of about as many trials each."""
_ALPHA = 0.05


@dataclass(frozen=True)
class Interaction:
    """Share of the losses' variance that two settings explain only together."""

    settings: tuple[str, str]
    share: float
    p_value: float
    """Of "there is none", corrected for the number of pairs."""

    @property
    def is_detected(self) -> bool:
        return self.p_value <= _ALPHA


def interactions(
    params: Sequence[dict[str, Any]], losses: Sequence[float], settings: Sequence[str]
) -> list[Interaction] | None:
    """Every pair of settings that can be told, the largest share first; None where the trials are too few.

    Args:
        params: settings by name, one dict a trial.
        losses: loss of each trial.
        settings: names to look at.
    """
    columns = {name: [point.get(name) for point in params] for name in settings}
    varied = [name for name, values in columns.items() if len(set(map(repr, values))) > 1]
    if len(varied) < 2 or len(params) < MIN_TRIALS:
        return None
    ones = np.ones((len(params), 1))
    alone = np.concatenate([ones, *(_effects(columns[name]) for name in varied)], axis=1)
    scores = {name: _scores(columns[name]) for name in varied}
    pairs = {
        (a, b): np.stack([x * y for x in scores[a].T for y in scores[b].T], axis=1)
        for a, b in itertools.combinations(varied, 2)
    }
    losses_M = np.asarray(losses, float)
    rest, rank = _residual(np.concatenate([alone, *pairs.values()], axis=1), losses_M)
    num_free = len(params) - rank
    total = float(((losses_M - losses_M.mean()) ** 2).sum())
    if num_free < MIN_FREE or total == 0:
        return None
    found = []
    for pair in pairs:
        others = [columns for other, columns in pairs.items() if other != pair]
        without, fewer = _residual(np.concatenate([alone, *others], axis=1), losses_M)
        num_terms = rank - fewer
        if not num_terms:  # no trials tell it from the settings' own effects
            continue
        gain = max(0.0, without - rest)
        ratio = (gain / num_terms) / max(rest / num_free, 1e-12 * total)
        p_value = len(pairs) * float(f_distribution.sf(ratio, num_terms, num_free))
        found.append(Interaction(pair, gain / total, min(1.0, p_value)))
    return sorted(found, key=lambda interaction: -interaction.share)


def interaction_sentence(found: list[Interaction] | None, num_trials: int, num_varied: int) -> str:
    """What the report says of the pairs; empty where there is no pair."""
    if num_varied < 2:
        return ""
    if found is None:
        why = (
            f"{num_trials} trials are too few to tell (at least {MIN_TRIALS} are needed)"
            if num_trials < MIN_TRIALS
            else f"{num_trials} trials are too few to tell for {num_varied} settings"
        )
        return f"Whether settings act together (interactions): {why}."
    real = [item for item in found if item.is_detected]
    if not found:
        return "No pair of settings was tried so that acting together could be told."
    if not real:
        first = found[0]
        return (
            f"No detectable interaction between settings over {num_trials} trials: the largest share, "
            f"{' x '.join(first.settings)} with {first.share:.0%}, may be chance."
        )
    parts = ", ".join(f"{' x '.join(item.settings)} {item.share:.0%}" for item in real)
    return (
        f"Settings that act together (share of the variance that only the pair explains, over "
        f"{num_trials} trials): {parts}. What one of them does depends on the other."
    )


def _effects(values: Sequence[Any]) -> np.ndarray:
    """Columns of a setting's own effect: its scores, and one column for each value but the first."""
    scores = _scores(values)
    if not are_numbers(values):
        return scores
    levels = levels_of(scores[:, 0], NUM_LEVELS)
    steps = (levels[:, None] == np.arange(1, levels.max() + 1)).astype(float)
    return np.concatenate([scores, steps], axis=1)


def _scores(values: Sequence[Any]) -> np.ndarray:
    """Of numbers one column, by ratio where all are above zero; else one for each value but the first."""
    if are_numbers(values):
        numbers = np.asarray(values, float)
        scores = np.log(numbers) if numbers.min() > 0 else numbers
        return ((scores - scores.mean()) / max(float(scores.std()), 1e-12))[:, None]
    kinds, levels = np.unique([repr(value) for value in values], return_inverse=True)
    return (levels[:, None] == np.arange(1, len(kinds))).astype(float)


def levels_of(numbers: np.ndarray, most: int) -> np.ndarray:
    """Numbers as 0, 1, ...: of more than `most` of them, ranges of about as many trials each."""
    distinct = np.unique(numbers)
    if len(distinct) <= most:
        return np.searchsorted(distinct, numbers)
    edges = np.quantile(numbers, np.linspace(0, 1, most + 1)[1:-1])
    return np.unique(np.searchsorted(edges, numbers, side="right"), return_inverse=True)[1]


def are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _residual(design: np.ndarray, losses_M: np.ndarray) -> tuple[float, int]:
    """Sum of squares that the fit leaves, and the number of its constants."""
    solution, _, rank, _ = np.linalg.lstsq(design, losses_M, rcond=1e-9)
    return float(((losses_M - design @ solution) ** 2).sum()), int(rank)
