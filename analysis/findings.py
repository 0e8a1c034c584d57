"""What a sweep says, in sentences no stronger than its data.

With per-example held-out losses a difference is called real only if its 95 % interval excludes zero;
without them (a CSV of train losses) nothing is, and the findings say so.
"""

from dataclasses import dataclass
from typing import Any

from analysis.load import Results, Trial
from analysis.stats import Effect, Interval, difference_interval, improvement, main_effects


@dataclass(frozen=True)
class Findings:
    """Sentences for the report, and the numbers behind them."""

    summary: list[str]
    """What was found."""
    caveats: list[str]
    """What it does not show."""
    effects: list[Effect]
    """Indices in them are of `Results.scored`."""


def find(results: Results) -> Findings:
    """Reads the findings off the results."""
    scored = results.scored
    effects = main_effects(
        [trial.params for trial in scored],
        [trial.loss or 0.0 for trial in scored],
        results.settings,
    )
    summary = [
        _best(results),
        *_ties(results),
        *_against_base(results),
        *_effects(results, effects),
        *_at_the_edge(results),
        *_overfitting(results),
    ]
    return Findings(summary, _caveats(results), effects)


def compare(a: Trial, b: Trial) -> Interval | None:
    """Interval of the loss of `a` minus that of `b`; None without per-example losses of both."""
    losses_a, losses_b = a.example_losses(), b.example_losses()
    if losses_a is None or losses_b is None or not _same_examples(a, b):
        return None
    return difference_interval(losses_a, losses_b)


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
    if best is baseline:
        return f"{text}; it is the baseline itself."
    gain = improvement(best.loss or 0, baseline.loss or 0)
    text += f", {gain:.1f} % below the baseline's {baseline.loss:.4f}"
    interval = compare(best, baseline)
    if interval is None:
        return f"{text}."
    real = "a real difference" if interval.excludes_zero else "which may be chance"
    return f"{text}: {interval_text(interval)}, {real}."


def _ties(results: Results) -> list[str]:
    best, *others = results.ranked
    intervals = [(trial, compare(trial, best)) for trial in others if trial.same_as is None]
    known = [(trial, interval) for trial, interval in intervals if interval is not None]
    tied = [trial for trial, interval in known if not interval.excludes_zero]
    if tied:
        names = ", ".join(f"{trial.name} ({trial.loss:.4f})" for trial in tied)
        cheapest = min([best, *tied], key=lambda trial: trial.num_steps or 0)
        advice = f" The one of fewest steps is {cheapest.name}." if cheapest is not best else ""
        return [f"Not to be told from the best on these examples: {names}.{advice}"]
    if known and len(known) == len(intervals):
        runner_up, interval = known[0]
        return [
            f"The runner-up, {runner_up.name}, is worse by {interval_text(interval)}: "
            "a real difference."
        ]
    return []


def _against_base(results: Results) -> list[str]:
    best = results.best
    if best.base_loss is None or best.loss is None:
        return []
    text = (
        f"The base model without an adapter has {best.base_loss:.4f}: the best trial is "
        f"{abs(improvement(best.loss, best.base_loss)):.1f} % "
        f"{'below' if best.loss < best.base_loss else 'ABOVE'} it"
    )
    worse = [t.name for t in results.scored if t.loss and t.base_loss and t.loss >= t.base_loss]
    if worse:
        text += f". No better than the base model: {', '.join(worse)}"
    return [f"{text}."]


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
    missing = [
        name for name in results.settings if name not in {effect.setting for effect in effects}
    ]
    if missing:
        sentences.append(
            f"No two trials differ in {' or '.join(missing)} alone, so its effect cannot be told."
        )
    return sentences


def _effect_strength(results: Results, group: dict[Any, int]) -> str:
    trials = sorted((results.scored[index] for index in group.values()), key=lambda t: t.loss or 0)
    interval = compare(trials[-1], trials[0])
    if interval is None:
        return ""
    real = "real" if interval.excludes_zero else "not to be told from chance"
    return f"; worst against best {interval_text(interval)}, {real}"


def _at_the_edge(results: Results) -> list[str]:
    sentences = []
    for name in results.settings:
        if name == "seed":
            continue  # a higher one is another one, no more
        values = sorted({t.params[name] for t in results.scored if _is_number(t.params.get(name))})
        best = results.best.params.get(name)
        if len(values) < 2 or best not in (values[0], values[-1]):
            continue
        side, verb = ("smallest", "lower") if best == values[0] else ("largest", "higher")
        sentences.append(
            f"The best {name}, {value_text(best)}, is the {side} that was tried: "
            f"a {verb} one may be better still."
        )
    return sentences


def _overfitting(results: Results) -> list[str]:
    names = []
    for trial in results.scored:
        at_best, at_end = trial.example_losses(), trial.last_example_losses()
        if trial.same_as is not None or at_best is None or at_end is None:
            continue
        if difference_interval(at_end, at_best).low > 0:
            names.append(f"{trial.name} (best at step {trial.best_step} of {trial.num_steps})")
    if not names:
        return []
    return [f"Held-out loss rises again before the end in {', '.join(names)}: overfitting."]


def _caveats(results: Results) -> list[str]:
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
    seeds = {trial.record.settings.get("seed") for trial in results.scored if trial.record}
    intervals = "Intervals are over held-out examples (paired bootstrap, 95 %)"
    if len(seeds) == 1:
        caveats.append(
            f"{intervals}; every trial has the same seed ({seeds.pop()}), and another seed may move "
            "a loss further than that."
        )
    else:
        caveats.append(f"{intervals}.")
    caveats.append(
        "The best trial was chosen on these validation examples, which flatters it a little; the "
        "test split is scored once, at promotion."
    )
    others = [t.name for t in results.scored if not _same_examples(t, results.best)]
    if others:
        caveats.append(
            "Scored on other validation examples than the best trial (or on the same, cut or "
            f"tokenised otherwise), so that their losses are not comparable: {', '.join(others)}."
        )
    unfinished = [trial for trial in results.trials if not trial.is_scored]
    if unfinished:
        names = ", ".join(f"{trial.name} ({trial.state})" for trial in unfinished)
        caveats.append(f"Not compared: {names}.")
    return caveats


def interval_text(interval: Interval) -> str:
    """`-0.1234 [-0.2000, -0.0500]`."""
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _loss_name(results: Results) -> str:
    return "train loss" if results.sweep is None else "eval/loss"


def _same_examples(a: Trial, b: Trial) -> bool:
    """Another max_length, say, makes other examples: then losses are not comparable."""
    if a.record is None or b.record is None:
        return False
    return a.record.result.get("validation_hash") == b.record.result.get("validation_hash")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_order(value: Any) -> Any:
    """Key to sort a setting's values by: numbers by size, then texts."""
    return (0, value, "") if _is_number(value) else (1, 0, str(value))
