"""What a sweep cost: time, tokens, steps, each shared one counted once.

A fork's `train_time_s` and `tokens` begin with those of the stage it was forked from, which another trial has
in its own: the stage's record says how much to leave out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.history import History
from analysis.load import Results
from sweeps.ledger import StepCount, TrialRecord
from training.paths import SweepPaths, TrialPaths, read_json

_FACTS = "state.json"
"""Of a stage's state: `record` holds what its trial had measured."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Cost:
    """Of all trials of a sweep: further seeds, pruned ones and those run again included."""

    train_s: float
    """Training and evaluation, summed over trials; a pack's time is shared out among them."""
    shared_s: float
    """What the sum of the trials' own figures would have counted twice."""
    is_estimate: bool
    """Whether a stage's record was missing, so that its time was taken in proportion to its steps."""
    busy_s: float | None
    """Time in which any trial was trained; None where metrics have no times."""
    tokens: int
    steps: StepCount
    num_unknown: int
    """Trials without a record of their time: running, failed, or interrupted."""
    device: str | None


def sweep_cost(results: Results, histories: Mapping[int, History]) -> Cost | None:
    """Cost of a sweep; None for a CSV, which tells no more than its minutes."""
    sweep = results.sweep
    if sweep is None:
        return None
    train_s = shared_s = 0.0
    tokens, num_unknown, is_estimate = 0, 0, False
    steps = StepCount()
    continued = {record.continues for record in sweep.all_trials}
    for record in sweep.all_trials:
        if record.number in continued:
            continue  # another machine's trial began with all that it had measured
        result = record.result
        if result:
            steps.add(result, record.settings.get("max_steps") or result.get("num_steps") or 0)
        if result.get("same_as") is not None:
            continue
        if result.get("train_time_s") is None:
            num_unknown += 1
            continue
        stage = _stage(sweep.paths, record)
        is_estimate = is_estimate or stage.is_estimate
        train_s += result["train_time_s"] - stage.time_s
        shared_s += stage.time_s
        tokens += (result.get("tokens") or 0) - stage.tokens
    stints = [stint for history in histories.values() for stint in history.stints()]
    return Cost(
        train_s=train_s,
        shared_s=shared_s,
        is_estimate=is_estimate,
        busy_s=_union_s(stints) if stints else None,
        tokens=tokens,
        steps=steps,
        num_unknown=num_unknown,
        device=_device(sweep.paths),
    )


def cost_rows(results: Results, cost: Cost | None) -> list[tuple[str, str]]:
    """What and how much, as text."""
    if cost is None:
        return [("time of all runs", f"{results.minutes:.1f} min"), ("energy", NOT_MEASURED)]
    device = f" on {cost.device}" if cost.device else ""
    about = "about " if cost.is_estimate else ""
    train = f"{about}{cost.train_s:,.0f} s{device}, evaluations included"
    if cost.shared_s:
        train += (
            f" (the trials' own figures sum up to {about}{cost.shared_s:,.0f} s more: shared steps)"
        )
    if cost.num_unknown:
        trials = "trial" if cost.num_unknown == 1 else "trials"
        train += f"; {cost.num_unknown} {trials} without a record of its time left out"
    rows = []
    if cost.busy_s is not None:
        rows.append(("wall time with a trial in training", f"{cost.busy_s / 60:,.1f} min"))
    rows.append(("training, summed over trials", train))
    if cost.tokens:
        rows.append(("tokens trained on", f"{about}{cost.tokens:,}"))
    rows.append(("steps trained", f"{cost.steps.trained:,}"))
    rows.append(("steps saved by stages and repeats", f"{cost.steps.saved:,}"))
    rows.append(("steps saved by pruning", f"{cost.steps.pruned:,}"))
    return [*rows, ("energy", NOT_MEASURED)]


@dataclass(frozen=True)
class _StageCost:
    time_s: float = 0.0
    tokens: int = 0
    is_estimate: bool = False


def _stage(paths: SweepPaths, record: TrialRecord) -> _StageCost:
    """What a fork's figures hold of the stage that it began with."""
    result = record.result
    saved = result.get("steps_saved") or 0
    if not saved:
        return _StageCost()
    name = str((result.get("forked_from") or {}).get("stage", ""))
    try:
        known = read_json(TrialPaths(paths.stages / name).state / _FACTS)["record"]
        return _StageCost(float(known["train_time_s"]), int(known["tokens"]))
    except (OSError, ValueError, KeyError, TypeError):
        share = saved / max(saved, result.get("num_steps") or 0)
        tokens = round(share * (result.get("tokens") or 0))
        return _StageCost(share * result["train_time_s"], tokens, True)


def _union_s(stints: list[tuple[float, float]]) -> float:
    total, until = 0.0, float("-inf")
    for begin, end in sorted(stints):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _device(paths: SweepPaths) -> str | None:
    try:
        environment: Any = json.loads(paths.environment.read_text("utf-8"))
        return str(environment["device"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
