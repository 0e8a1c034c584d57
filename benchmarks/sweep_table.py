"""What `benchmarks.sweep` has measured: ways beside each other, as numbers and as a Markdown table."""

import itertools
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VARIED = ("max_steps", "learning_rate", "lora_r")
WAYS = {
    "a": "(a) SFTTrainer, a process a trial",
    "b": "(b) packed",
    "c": "(c) and stage tree",
    "d": "(d) and pruning, confirmed",
    "d_strict": "(d) and pruning, strict",
}
SPLIT = {
    "start_s": "start, imports",
    "load_s": "model, data",
    "work_s": "steps and evaluations",
    "end_s": "end",
}

Result = dict[str, Any]
"""Of one way with one seed; losses by `point_key`, in nats a supervised token."""


def points(scale: dict[str, Any]) -> list[dict[str, Any]]:
    """The varied settings of every trial."""
    values = itertools.product(*(scale[name] for name in VARIED))
    return [dict(zip(VARIED, point, strict=True)) for point in values]


def point_key(settings: dict[str, Any]) -> str:
    steps, rate, rank = (settings[name] for name in VARIED)
    return f"{steps} steps, lr {rate:g}, rank {rank}"


def winner_file(directory: Path, way: str) -> Path:
    """Losses of each validation example by the way's winner, at the end of its training."""
    return directory / way / "winner.parquet"


def compare(measured: dict[str, Result], directory: Path) -> None:
    """Adds to each way how its winner stands beside that of (a)."""
    import pandas as pd

    from analysis.stats import difference_interval

    if "a" not in measured:
        return
    losses = measured["a"]["losses"]
    for way, result in measured.items():
        result["regret"] = losses[result["winner"]] - losses[measured["a"]["winner"]]
        own, other = winner_file(directory, way), winner_file(directory, "a")
        if own.is_file() and other.is_file():  # else what an earlier start has found stands
            interval = difference_interval(pd.read_parquet(own), pd.read_parquet(other))
            ends = [interval.estimate, interval.low, interval.high]
            result["difference"] = [round(end, 6) for end in ends]


def largest_difference(one: Result, other: Result) -> float:
    """Between the losses of the trials that both have trained to their end."""
    both = one["losses"].keys() & other["losses"].keys()
    return max(abs(one["losses"][key] - other["losses"][key]) for key in both)


def rank_correlations(measured: dict[str, Result]) -> dict[int, float]:
    """Step -> Spearman's correlation of the longest trials' losses there and after their cooldown."""
    from scipy.stats import spearmanr

    result = measured.get("c") or measured.get("b")
    correlations = {}
    if result is not None:
        for step, losses in result["rungs"].items():
            pairs = [(loss, result["losses"][key]) for key, loss in losses.items()]
            if len(pairs) > 2:
                correlations[int(step)] = float(spearmanr(pairs).statistic)  # pyright: ignore
    return correlations


def describe(result: Result) -> str:
    regret = f", regret {result['regret']:.4f}" if "regret" in result else ""
    return (
        f"{result['wall_clock_s']:.0f} s; {result['trial_steps']} trial-steps, "
        f"{result['num_pruned']} pruned; winner {result['winner']}, loss "
        f"{result['winner_loss']:.4f}{regret}"
    )


def _sampled(seeds: Iterable[dict[str, Result]]) -> list[str]:
    timed = {m["a"].get("num_timed", len(m["a"]["losses"])) for m in seeds if "a" in m}
    all_trials = {len(m["a"]["losses"]) for m in seeds if "a" in m}
    if timed == all_trials:
        return []
    return [
        f"Of (a), {min(timed)} trials were timed, one of each length and each alone; the others of its "
        "length count as much. They were trained several at a time, for their losses.",
        "",
    ]


def table(results: dict[str, Any]) -> str:
    """Markdown of all that was measured."""
    seeds: dict[str, dict[str, Result]] = results["seeds"]
    scale = results["settings"]
    shown = ", ".join(f"{name} {value}" for name, value in scale.items())
    devices = {r["device"] for m in seeds.values() for r in m.values() if "device" in r}
    lines = [
        f"{len(points(scale))} trials; {shown}. Seeds {', '.join(seeds)}. "
        f"{len(os.sched_getaffinity(0))} cores, {' and '.join(sorted(devices)) or 'device not known'}.",
        "",
        *_sampled(seeds.values()),
        "Means over seeds. Regret is what the chosen settings lose in (a)'s own table against its best.",
        "",
        "| way | wall-clock, s | against (a) | against (a) in one process | trial-steps | tokens | "
        "pruned | regret, nats |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, title in WAYS.items():
        both = [(m.get("a"), m[way]) for m in seeds.values() if way in m]
        if both:
            cells = [
                _mean((r["wall_clock_s"] for _, r in both), ".0f"),
                _mean((a["wall_clock_s"] / r["wall_clock_s"] for a, r in both if a), ".2f", "×"),
                _mean((a["one_process_s"] / _time_s(r) for a, r in both if a), ".2f", "×"),
                _mean((r["trial_steps"] for _, r in both), ",.0f"),
                _mean((r["tokens"] for _, r in both), ",.0f"),
                _mean((r["num_pruned"] for _, r in both), ".1f"),
                _mean((r["regret"] for _, r in both if "regret" in r), ".4f"),
            ]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", *_seed_table(seeds), "", *_split_table(seeds), ""]
    lines += [*_losses_text(seeds), *_correlation_table(seeds)]
    return "\n".join(lines)


def _time_s(result: Result) -> float:
    return result.get("one_process_s", result["wall_clock_s"])


def _mean(values: Iterable[float], form: str, unit: str = "") -> str:
    values = list(values)
    return f"{statistics.mean(values):{form}}{unit}" if values else ""


def _seed_table(seeds: dict[str, dict[str, Result]]) -> list[str]:
    lines = [
        "Losses are those of the winner's last adapter on the validation examples; the difference to "
        "(a)'s winner is paired by example, with its 95 % interval.",
        "",
        "| seed | way | wall-clock, s | against (a) | winner | loss | difference | regret |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for seed, measured in seeds.items():
        for way in filter(measured.__contains__, WAYS):
            result, ratio, difference, regret = measured[way], "", "", ""
            if "a" in measured:
                ratio = f"{measured['a']['wall_clock_s'] / result['wall_clock_s']:.2f}×"
                regret = f"{result['regret']:.4f}"
            if way != "a" and "difference" in result:
                difference = "{:+.4f} ({:+.4f} to {:+.4f})".format(*result["difference"])
            lines.append(
                f"| {seed} | {WAYS[way]} | {result['wall_clock_s']:.0f} | {ratio} | "
                f"{result['winner']} | {result['winner_loss']:.4f} | {difference} | {regret} |"
            )
    return lines


def _split_table(seeds: dict[str, dict[str, Result]]) -> list[str]:
    """Steps and evaluations are one column: in a pack they are of several trials at once."""
    lines = [
        "Where the seconds go, means over seeds; of (a) the sums of its processes. What `sweeps.run` does "
        "before it loads the model is start; the base model's own evaluation is in model, data.",
        "",
        f"| way | {' | '.join(SPLIT.values())} |",
        f"| --- |{' ---: |' * len(SPLIT)}",
    ]
    for way, title in WAYS.items():
        splits = [measured[way]["split_s"] for measured in seeds.values() if way in measured]
        if splits:
            cells = [_mean((split[name] for split in splits), ".1f") for name in SPLIT]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _losses_text(seeds: dict[str, dict[str, Result]]) -> list[str]:
    lines = []
    for one, other in (("c", "b"), ("b", "a")):
        found = [
            largest_difference(m[one], m[other]) for m in seeds.values() if {one, other} <= {*m}
        ]
        if found:
            lines.append(
                f"Largest difference of a trial's loss between ({one}) and ({other}): "
                f"{', '.join(f'{value:.1e}' for value in found)} nats (a value a seed)."
            )
    return [*lines, ""]


def _correlation_table(seeds: dict[str, dict[str, Result]]) -> list[str]:
    found = {seed: rank_correlations(measured) for seed, measured in seeds.items()}
    found = {seed: correlations for seed, correlations in found.items() if correlations}
    if not found:
        return []
    lines = [
        "Does the order before the cooldown predict the order after it? Spearman's rank correlation of the "
        "longest trials' losses at a step and at their end.",
        "",
        f"| step | mean | {' | '.join(f'seed {seed}' for seed in found)} |",
        f"| ---: | ---: |{' ---: |' * len(found)}",
    ]
    for step in sorted(next(iter(found.values()))):
        values = [correlations[step] for correlations in found.values()]
        shown = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {step} | {statistics.mean(values):.2f} | {shown} |")
    return [*lines, ""]
