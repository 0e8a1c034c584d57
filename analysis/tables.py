"""The report's tables as text: trials, settings over seeds, answers before and after; and trials.csv."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.choice import summarize_seeds
from analysis.findings import interval_text, value_text
from analysis.load import Results, Trial
from analysis.stats import Interval, improvement
from sweeps.ledger import TrialRecord


@dataclass(frozen=True)
class Table:
    """A table of the report."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Answer:
    """What the base model and the best trial answered to one of the sweep's fixed prompts."""

    prompt: str
    before: str
    after: str


def trials_table(results: Results, against_baseline: Mapping[int, Interval]) -> Table:
    """A row a trial; further seeds are in `seeds_table`."""
    names = ["#", "trial", *results.settings, "loss"]
    if results.sweep:
        names += ["against baseline, 95 %", "best step"]
    names += ["improvement %", "minutes"]
    return Table(
        names, [_trial_row(results, t, against_baseline.get(t.number)) for t in results.trials]
    )


def seeds_table(results: Results) -> Table | None:
    """A row for each setting with more than one seed, the lowest mean first; None where there is none."""
    rows = []
    for trial, records in _seeds(results):
        losses = [r.loss for r in records if _is_scored(r) and r.loss is not None]
        if len(losses) < 2:
            continue
        summary = summarize_seeds(losses)
        cells = [str(trial.number), trial.name]
        cells += [value_text(trial.params.get(name, "")) for name in results.settings]
        cells += [
            str(summary.num_seeds),
            f"{summary.mean:.4f}",
            f"[{summary.low:.4f}, {summary.high:.4f}]",
            f"{summary.standard_deviation:.4f}",
            f"{min(losses):.4f} to {max(losses):.4f}",
        ]
        rows.append((summary.mean, cells))
    if not rows:
        return None
    header = ["#", "trial", *results.settings]
    header += ["seeds", "mean loss", "95 % (t)", "standard deviation", "lowest to highest"]
    return Table(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def seed_runs_table(results: Results) -> Table | None:
    """A row for every run of a setting that was to have more than one seed; None where there is none."""
    rows = []
    for trial, records in _seeds(results):
        for record in records:
            loss = f"{record.loss:.4f}" if _is_scored(record) else record.state
            step = record.result.get("best_step")
            rows.append(
                [
                    str(record.number),
                    trial.name,
                    str(record.settings.get("seed", "")),
                    loss,
                    "" if step is None else f"{step:,}",
                ]
            )
    return Table(["#", "setting", "seed", "loss", "best step"], rows) if rows else None


def answers(results: Results) -> list[Answer]:
    """Answers of the base model and of the best trial, at its best step or the last one before it."""
    record = results.best.record
    if record is None:
        return []
    samples = record.samples()
    tuned = [step for step in samples if 0 < step <= (results.best.best_step or 0)]
    if 0 not in samples or not tuned:
        return []
    pairs = zip(samples[0], samples[max(tuned)], strict=False)
    return [
        Answer(before["prompt"], _response(before), _response(after))
        for before, after in pairs
        if before["prompt"] == after["prompt"]
    ]


def trials_csv(results: Results) -> str:
    """Every trial and every further seed, which says whose settings it has (`seed_of`)."""
    rows = [
        {
            "number": trial.number,
            "name": trial.name,
            **{name: trial.params.get(name) for name in results.settings},
            "state": trial.state,
            "loss": trial.loss,
            "improvement_percent": gain(results, trial),
            "best_step": trial.best_step,
            "num_steps": trial.num_steps,
            "base_loss": trial.base_loss,
            "train_loss": trial.train_loss,
            "minutes": trial.minutes,
            "same_as": trial.same_as,
            "seed": trial.record.settings.get("seed") if trial.record else None,
            "seed_of": None,
        }
        for trial in results.trials
    ]
    for trial, records in _seeds(results):
        rows += [
            _seed_row(results, trial, record) for record in records if record.seed_of is not None
        ]
    return pd.DataFrame(rows).to_csv(index=False)


def gain(results: Results, trial: Trial) -> float | None:
    """Percent against the baseline, of trials that can be compared with it."""
    loss, baseline = trial.loss, results.baseline.loss
    if trial not in results.compared or loss is None or baseline is None:
        return None
    return improvement(loss, baseline)


def _trial_row(results: Results, trial: Trial, interval: Interval | None) -> list[str]:
    baseline = results.baseline
    cells = [str(trial.number), trial.name]
    cells += [value_text(trial.params.get(name, "")) for name in results.settings]
    cells.append(f"{trial.loss:.4f}" if trial.is_scored else trial.state)
    if results.sweep:
        cells.append(interval_text(interval) if interval else "")
        cells.append("" if trial.best_step is None else f"{trial.best_step:,}")
    percent = gain(results, trial)
    cells.append("baseline" if trial is baseline else "" if percent is None else f"{percent:.1f}")
    if trial.same_as is not None:
        cells.append(f"as trial {trial.same_as}")
    else:
        cells.append("" if trial.minutes is None else f"{trial.minutes:.1f}")
    return cells


def _seeds(results: Results) -> list[tuple[Trial, list[TrialRecord]]]:
    """Trials that have further seeds, each with its own record and theirs."""
    if results.sweep is None:
        return []
    further: dict[int, list[TrialRecord]] = {}
    for record in results.sweep.trials:
        if record.seed_of is not None:
            further.setdefault(record.seed_of, []).append(record)
    return [
        (trial, [trial.record, *further[trial.number]])
        for trial in results.trials
        if trial.record is not None and trial.number in further
    ]


def _seed_row(results: Results, first: Trial, record: TrialRecord) -> Mapping[str, Any]:
    result = record.result
    time_s = result.get("train_time_s")
    return {
        "number": record.number,
        "name": record.name,
        **{name: first.params.get(name) for name in results.settings},
        "state": record.state,
        "loss": record.loss,
        "best_step": result.get("best_step"),
        "num_steps": result.get("num_steps"),
        "base_loss": result.get("base_eval/loss"),
        "train_loss": result.get("train/loss"),
        "minutes": None if time_s is None else time_s / 60,
        "same_as": result.get("same_as"),
        "seed": record.settings.get("seed"),
        "seed_of": first.number,
    }


def _is_scored(record: TrialRecord) -> bool:
    return record.state == "complete" and record.loss is not None


def _response(sample: Mapping[str, Any]) -> str:
    return sample["response"] if sample["ended"] else f"{sample['response']} […]"
