"""What a sweep says, in sentences no stronger than its data.

With per-example held-out losses a difference is called real only if its 95 % interval excludes zero;
one that was picked as the most extreme of several is tested as all of them (Bonferroni). Without such
losses (a CSV of train losses) nothing is called real, and the findings say so.
"""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.choice import LossTable
from analysis.cost import Cost, sweep_cost
from analysis.history import History, read_histories
from analysis.interactions import Interaction, interactions
from analysis.lines import STEP, TRAIN
from analysis.load import Results, Trial
from analysis.outlook import Outlook, flattery, look_ahead, loss_table, may_be_best, trained
from analysis.stats import (
    MIN_EXAMPLES,
    SEED,
    Effect,
    Interval,
    corrected,
    difference_interval,
    improvement,
    main_effects,
    seed_noise,
)


@dataclass(frozen=True)
class Findings:
    """Sentences for the report, and the numbers behind them."""

    summary: list[str]
    """What was found."""
    caveats: list[str]
    """What it does not show."""
    effects: list[Effect]
    """Indices in them are of `Results.scored`."""
    outlook: Outlook
    undetected: set[str]
    """Settings whose effect cannot be told from chance."""
    interactions: list[Interaction] | None
    """None where the trials are too few to tell."""
    table: LossTable | None
    """Per-example losses of `trained(results)`; None where some are missing."""
    against_baseline: dict[int, Interval]
    """By trial number, of the trials that have losses on the baseline's examples."""
    histories: dict[int, History]
    """By trial number; none of a CSV."""
    cost: Cost | None


def find(results: Results) -> Findings:
    """Reads the findings off the results."""
    effects = main_effects(*_table(results))
    table = loss_table(trained(results))
    histories = read_histories(results.sweep)
    summary = [
        _best(results),
        *_ties(results, table),
        *_against_base(results),
        *_effects(results, effects),
        *_at_the_edge(results),
        *_overfitting(results, histories),
        *_seed_noise(results),
    ]
    # Copies of a trial are no evidence of their own; a CSV has train losses, which tell nothing for certain.
    own = trained(results) if results.sweep is not None else []
    pairs = interactions(
        [trial.params for trial in own],
        [trial.loss or 0.0 for trial in own],
        [name for name in results.settings if name != SEED],
    )
    outlook = look_ahead(results, effects, pairs)
    return Findings(
        summary=summary + outlook.sentences,
        caveats=_caveats(results, table),
        effects=effects,
        outlook=outlook,
        undetected={effect.setting for effect in effects if _is_undetected(results, effect)},
        interactions=pairs,
        table=table,
        against_baseline=_against_baseline(results),
        histories=histories,
        cost=sweep_cost(results, histories),
    )


def compare(a: Trial, b: Trial, num_comparisons: int = 1) -> Interval | None:
    """Interval of the loss of `a` minus that of `b`; None without losses of both on the same examples.

    The pair may have been picked as the most extreme of `num_comparisons`.
    """
    if a.examples != b.examples:
        return None
    return _interval(a.example_losses(), b.example_losses(), num_comparisons)


def value_text(value: Any) -> str:
    """`0.0005` as `5e-4`, `1000` as `1,000`; other values as they are."""
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            mantissa, exponent = f"{value:.3e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def params_text(params: dict[str, Any], names: list[str]) -> str:
    """`max_steps 1,000, learning_rate 5e-4`."""
    return ", ".join(f"{name} {value_text(params.get(name))}" for name in names)


def _best(results: Results) -> str:
    best, baseline = results.best, results.baseline
    text = (
        f"Best: {best.name} ({params_text(best.params, results.settings)}) with "
        f"{_loss_name(results)} {best.loss:.4f}"
    )
    is_itself = results.baseline_note is None
    if best is baseline:
        return (
            f"{text}; it {'is the baseline itself' if is_itself else 'stands in for the baseline'}."
        )
    gain = improvement(best.loss or 0, baseline.loss or 0)
    whose = "the baseline's" if is_itself else f"that of {baseline.name},"
    text += f", {gain:.1f} % below {whose} {baseline.loss:.4f}"
    interval = compare(best, baseline, _num_trained(results) - 1)
    return f"{text}{_verdict(interval)}."


def _against_baseline(results: Results) -> dict[int, Interval]:
    baseline = results.baseline
    found = {t.number: compare(t, baseline) for t in results.scored if t is not baseline}
    return {number: interval for number, interval in found.items() if interval is not None}


def _ties(results: Results, table: LossTable | None) -> list[str]:
    candidates = may_be_best(results, table)
    if candidates is None:
        return []
    best, *tied = candidates
    if tied:
        names = ", ".join(f"{trial.name} ({trial.loss:.4f})" for trial in tied)
        cheapest = min([best, *tied], key=lambda trial: trial.num_steps or 0)
        advice = f" The one of fewest steps is {cheapest.name}." if cheapest is not best else ""
        return [f"Not to be told from the best on these examples: {names}.{advice}"]
    others = [t for t in results.ranked if t is not best and t.same_as is None]
    interval = compare(others[0], best) if others else None
    if interval is None:
        return []
    return [
        f"The runner-up, {others[0].name}, is worse by {interval_text(interval)}: a real difference."
    ]


def _against_base(results: Results) -> list[str]:
    best = results.best
    if best.base_loss is None or best.loss is None:
        return []
    text = (
        f"The base model without an adapter has {best.base_loss:.4f}: the best trial is "
        f"{abs(improvement(best.loss, best.base_loss)):.1f} % "
        f"{'below' if best.loss < best.base_loss else 'ABOVE'} it"
    )
    text += _verdict(_against_own_base(best, _num_trained(results)))
    worse, unclear = [], []
    for trial in results.scored:
        if trial.loss is None or trial.base_loss is None:
            continue
        interval = _against_own_base(trial, _num_trained(results))
        if trial.loss >= trial.base_loss:
            worse.append(trial.name)
        elif interval is not None and not interval.excludes_zero and trial is not best:
            unclear.append(trial.name)
    if worse:
        text += f". No better than the base model: {', '.join(worse)}"
    if unclear:
        text += f". Not to be told from the base model: {', '.join(unclear)}"
    return [f"{text}."]


def _against_own_base(trial: Trial, num_comparisons: int) -> Interval | None:
    return _interval(trial.example_losses(), trial.base_example_losses(), num_comparisons)


def _effects(results: Results, effects: list[Effect]) -> list[str]:
    sentences = []
    for rank, effect in enumerate(effects):
        group = max(effect.groups, key=len)
        trials = sorted(group.items(), key=lambda item: value_order(item[0]))
        values = ", ".join(
            f"{value_text(value)}: {results.scored[index].loss:.4f}" for value, index in trials
        )
        others = [name for name in results.settings if name != effect.setting]
        fixed = results.scored[next(iter(group.values()))].params
        at = f" at {params_text(fixed, others)}" if others else ""
        text = f"{effect.setting} moves the loss by {effect.spread:.4f} ({values}{at})"
        if rank == 0 and len(effects) > 1:
            text = f"Dominant setting: {text}"
        sentences.append(f"{text}{_effect_strength(results, group)}.")
    known = {SEED, *(effect.setting for effect in effects)}
    missing = [name for name in results.settings if name not in known]
    if missing:
        all_same = len({trial.examples for trial in results.scored}) == 1
        which = "trials" if all_same else "trials that were scored on the same examples"
        sentences.append(
            f"No two {which} differ in {' or '.join(missing)} alone, so its effect cannot be told."
        )
    return sentences


def _is_undetected(results: Results, effect: Effect) -> bool:
    intervals = [_group_interval(results, group) for group in effect.groups]
    return all(interval is not None and not interval.excludes_zero for interval in intervals)


def _group_interval(results: Results, group: dict[Any, int]) -> Interval | None:
    """Worst against best of the trials that differ in one setting alone."""
    trials = sorted((results.scored[index] for index in group.values()), key=lambda t: t.loss or 0)
    return compare(trials[-1], trials[0], len(trials) * (len(trials) - 1) // 2)


def _effect_strength(results: Results, group: dict[Any, int]) -> str:
    interval = _group_interval(results, group)
    if interval is None:
        return ""
    real = "real" if interval.excludes_zero else "not to be told from chance"
    return f"; worst against best {interval_text(interval)}, {real}"


def _at_the_edge(results: Results) -> list[str]:
    sentences = []
    for name in results.settings:
        if name == SEED:
            continue  # a higher one is another one, no more
        values = sorted(
            {t.params[name] for t in results.compared if _is_number(t.params.get(name))}
        )
        best = results.best.params.get(name)
        if len(values) < 2 or best not in (values[0], values[-1]):
            continue
        side, verb = ("smallest", "lower") if best == values[0] else ("largest", "higher")
        sentences.append(
            f"The best {name}, {value_text(best)}, is the {side} that was tried: "
            f"a {verb} one may be better still."
        )
    return sentences


def _overfitting(results: Results, histories: dict[int, History]) -> list[str]:
    sentences = {
        True: "while train loss went on falling: overfitting",
        False: "and train loss did not go on falling: unstable",
        None: "where no train losses tell whether that is overfitting",
    }
    found: dict[bool | None, list[str]] = {}
    for trial in results.scored:
        history = histories.get(trial.number)
        if history is None or trial.same_as is not None or trial.best_step == trial.num_steps:
            continue
        # The best step is the lowest of all evaluations, so that any other one looks higher.
        interval = _interval(
            trial.last_example_losses(), trial.example_losses(), len(history.evaluated)
        )
        if interval is not None and interval.low > 0:
            name = f"{trial.name} (best at step {trial.best_step} of {trial.num_steps})"
            found.setdefault(_goes_on_falling(trial, history), []).append(name)
    return [
        f"Held-out loss rises again before the end in {', '.join(found[falls])}, {sentence}."
        for falls, sentence in sentences.items()
        if falls in found
    ]


def _goes_on_falling(trial: Trial, history: History) -> bool | None:
    """Whether train loss after the best step is below that of as many steps before; None: not known."""
    steps, losses = history.train[:, STEP], history.train[:, TRAIN]
    is_after = steps > (trial.best_step or 0)
    after = losses[is_after]
    before = losses[~is_after][-len(after) :]
    return bool(after.mean() < before.mean()) if len(after) and len(before) else None


def _seed_noise(results: Results) -> list[str]:
    noise = seed_noise(*_table(results))
    if noise is None:
        return []
    return [
        f"Noise level: trials that differ in the seed alone ({noise.num_trials} of "
        f"{noise.num_groups} {'setting' if noise.num_groups == 1 else 'settings'}) have a standard "
        f"deviation of {noise.standard_deviation:.4f} and differ by up to "
        f"{noise.largest_range:.4f}: a smaller difference between settings may be the seed's."
    ]


def _caveats(results: Results, table: LossTable | None) -> list[str]:
    caveats = []
    if results.sweep is None:
        caveats.append(
            "The loss is the final train loss: there is no held-out data, so overfitting cannot be "
            "seen, and trials of other step counts were not scored on the same examples."
        )
        caveats.append(
            "One seed and no per-example losses: these differences carry no error bars, and the "
            "order of near trials may be chance."
        )
        return caveats
    seeds = {trial.record.settings.get(SEED) for trial in results.scored if trial.record}
    caveats.append(
        "Intervals are over held-out examples (95 %), those of differences by paired bootstrap. In the "
        "findings, one that is the most extreme of several is so wide that all of them hold together "
        "(Bonferroni); in table and figure each stands for itself. Bars in the slices are of each "
        "trial's own loss: trials whose bars overlap may well differ."
    )
    of_seeds = (
        f"Every trial has the same seed ({seeds.pop()})"
        if len(seeds) == 1
        else "An interval does not hold what the seed does"
    )
    caveats.append(f"{of_seeds}: another seed may move a loss further than its interval.")
    flattered = flattery(table)
    amount = "a little" if flattered is None else f"by about {flattered:.4f} or more"
    caveats.append(
        f"The best trial was chosen on these validation examples, which flatters it {amount}; the "
        "test split is scored once, at promotion."
    )
    if results.baseline_note:
        caveats.append(results.baseline_note)
    others = [trial.name for trial in results.scored if trial not in results.compared]
    if others:
        caveats.append(
            "Scored on other validation examples than the best trial (or on the same, cut or "
            "tokenised otherwise), so that their losses are not comparable: "
            f"{', '.join(others)}."
        )
    unfinished = [trial for trial in results.trials if not trial.is_scored]
    if unfinished:
        names = ", ".join(f"{trial.name} ({trial.state})" for trial in unfinished)
        caveats.append(f"Not compared: {names}.")
    return caveats


def interval_text(interval: Interval) -> str:
    """`-0.1234 [-0.2000, -0.0500]`."""
    if math.isinf(interval.high):
        return f"{interval.estimate:+.4f} [fewer than {MIN_EXAMPLES} examples]"
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _loss_name(results: Results) -> str:
    return "train loss" if results.sweep is None else "eval/loss"


def _table(
    results: Results,
) -> tuple[list[dict[str, Any]], list[float], list[str], list[str | None]]:
    """Arguments of `main_effects`: what is known of the scored trials."""
    scored = results.scored
    return (
        [trial.params for trial in scored],
        [trial.loss or 0.0 for trial in scored],
        results.settings,
        [trial.examples for trial in scored],
    )


def _num_trained(results: Results) -> int:
    """Trials that can be the best one; a copy adds no chance of its own."""
    return sum(trial.same_as is None for trial in results.compared)


def _interval(
    a: pd.DataFrame | None, b: pd.DataFrame | None, num_comparisons: int
) -> Interval | None:
    if a is None or b is None:
        return None
    return difference_interval(a, b, corrected(num_comparisons))


def _verdict(interval: Interval | None) -> str:
    if interval is None:
        return ""
    real = "a real difference" if interval.excludes_zero else "which may be chance"
    return f": {interval_text(interval)}, {real}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_order(value: Any) -> Any:
    """Key to sort a setting's values by: numbers by size, then texts."""
    return (0, value, "") if _is_number(value) else (1, 0, str(value))
