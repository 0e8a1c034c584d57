"""What to expect beyond what was tried: more steps, more seeds, less time; in sentences and numbers.

`look_ahead(results, effects, interactions)` -> `Outlook`, for the report's findings and figures.
"""

from dataclasses import dataclass

from analysis.choice import LossTable, chances_to_be_best, optimism, seeds_needed, summarize_seeds
from analysis.interactions import Interaction, interaction_sentence
from analysis.load import Results, Trial
from analysis.stats import MIN_EXAMPLES, SEED, Effect
from analysis.trends import Importance, StepsTrend, importances, pareto_front, steps_trend
from training.exceptions import DataError

STEPS = "max_steps"
MAY_BE_BEST = 0.05
"""Smallest chance with which a trial may still be the best."""


@dataclass(frozen=True)
class Outlook:
    """What the report says of what was not tried, and the numbers of its figures."""

    sentences: list[str]
    trend: StepsTrend | None
    importances: list[Importance]
    front: list[Trial]
    """Trials that no other one beats in both loss and time, the fastest last."""


def look_ahead(results: Results, effects: list[Effect], pairs: list[Interaction] | None) -> Outlook:
    """Trend over steps, importance of settings and pairs of them, seeds, and what is worth its time."""
    trend = _trend(results, effects)
    shares = importances(
        [trial.params for trial in results.compared],
        [trial.loss or 0.0 for trial in results.compared],
        [name for name in results.settings if name != SEED],
    )
    front = _front(results)
    sentences = [
        *_trend_sentence(trend),
        *_importance_sentence(shares, len(results.compared)),
        *_interaction_sentence(results, pairs),
        *_seed_sentences(results),
        *_front_sentence(front),
    ]
    return Outlook(sentences, trend, shares, front)


def trained(results: Results) -> list[Trial]:
    """Trials that can be ranked, the lowest loss first, without those that are copies of others."""
    return [trial for trial in results.ranked if trial.same_as is None]


def may_be_best(results: Results, table: LossTable | None) -> list[Trial] | None:
    """Trials that may be the best one, the best first; None without losses of all on the same examples.

    Args:
        results: the sweep.
        table: `loss_table(trained(results))`.
    """
    if table is None:
        return None
    kept = zip(trained(results), chances_to_be_best(table), strict=True)
    return [trial for trial, chance in kept if trial is results.best or chance >= MAY_BE_BEST]


def flattery(table: LossTable | None) -> float | None:
    """By how much the best trial's loss is too low for having been chosen, nats a token."""
    return None if table is None else max(0.0, optimism(table))


def loss_table(trials: list[Trial]) -> LossTable | None:
    """Losses at the best steps; None where some are missing, of other examples, or of too few."""
    found = [trial.example_losses() for trial in trials]
    frames = [frame for frame in found if frame is not None]
    if not frames or len(frames) < len(found) or len(frames[0]) < MIN_EXAMPLES:
        return None
    try:
        return LossTable.of(frames)
    except DataError:
        return None


def _trend(results: Results, effects: list[Effect]) -> StepsTrend | None:
    effect = next((effect for effect in effects if effect.setting == STEPS), None)
    if effect is None:
        return None
    group = max(effect.groups, key=len)
    table = loss_table([results.scored[index] for index in group.values()])
    return None if table is None else steps_trend(list(group), table)


def _trend_sentence(trend: StepsTrend | None) -> list[str]:
    if trend is None:
        return []
    steps = ", ".join(f"{step:,}" for step in trend.steps)
    if trend.gain_low <= 0:
        return [
            f"More steps: a power law through {steps} steps does not say that more than "
            f"{trend.steps[-1]:,} would help."
        ]
    return [
        f"More steps: {trend.doubled_steps:,} would take another {trend.gain:.4f} "
        f"[{trend.gain_low:.4f}, {trend.gain_high:.4f}] off the loss, if the power law through "
        f"{steps} steps holds: an extrapolation."
    ]


def _importance_sentence(shares: list[Importance], num_trials: int) -> list[str]:
    if not shares:
        return []
    parts = ", ".join(
        f"{item.setting} {item.fanova:.0%} (± {item.fanova_spread:.0%}; PED-ANOVA {item.ped_anova:.0%})"
        for item in shares
    )
    return [f"Importance by fANOVA over {num_trials} trials: {parts}."]


def _interaction_sentence(results: Results, pairs: list[Interaction] | None) -> list[str]:
    params = [trial.params for trial in results.compared]
    names = [name for name in results.settings if name != SEED]
    num_varied = sum(len({repr(point.get(name)) for point in params}) > 1 for name in names)
    sentence = interaction_sentence(pairs, len(params), num_varied)
    return [sentence] if sentence else []


def _seed_sentences(results: Results) -> list[str]:
    """Means over seeds of the best and the next one, and the seeds that would tell them apart."""
    if results.sweep is None:
        return []
    several: list[tuple[Trial, list[float]]] = []
    for trial in results.ranked:
        losses = results.sweep.seed_losses(trial.record) if trial.record else []
        if len(losses) > 1:
            several.append((trial, losses))
    sentences = []
    summaries = [(trial, summarize_seeds(losses)) for trial, losses in several]
    summaries.sort(key=lambda item: item[1].mean)
    for trial, summary in summaries:
        sentences.append(
            f"{trial.name} over {summary.num_seeds} seeds: {summary.mean:.4f} "
            f"[{summary.low:.4f}, {summary.high:.4f}], standard deviation "
            f"{summary.standard_deviation:.4f}."
        )
    if len(summaries) > 1:
        (best, a), (second, b) = summaries[:2]
        spread = ((a.standard_deviation**2 + b.standard_deviation**2) / 2) ** 0.5
        number = seeds_needed(b.mean - a.mean, spread)
        needed = "more than 1,000 seeds" if number is None else f"{number} seeds"
        sentences.append(
            f"To tell {best.name} from {second.name} at this spread, {needed} of each would do in "
            "four of five attempts."
        )
    return sentences


def _front(results: Results) -> list[Trial]:
    timed = [trial for trial in results.compared if trial.minutes and trial.same_as is None]
    points = [(trial.loss or 0.0, trial.minutes or 0.0) for trial in timed]
    return [timed[index] for index in pareto_front(points)]


def _front_sentence(front: list[Trial]) -> list[str]:
    if len(front) < 2:
        return []
    shown = "; ".join(
        f"{trial.name} {trial.loss:.4f} in {trial.minutes:.1f} min" for trial in front
    )
    return [f"Worth their time (no other trial is both better and faster): {shown}."]
