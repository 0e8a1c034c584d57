"""A sweep directory read back as records: what analysis and deploy know about a sweep.

`read_sweep("runs/quickstart")` -> `SweepRecord` with one `TrialRecord` a trial directory, ordered by
number. Reads only; never opens the study, so it is safe while the sweep is running.
"""

import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from training.config import TrialConfig
from training.exceptions import SweepError
from training.paths import SweepPaths, TrialPaths, read_json

METRIC = "eval/loss"


@dataclass(frozen=True)
class TrialRecord:
    """One trial as its directory tells it."""

    number: int
    paths: TrialPaths
    name: str
    """What the sampler calls it (`baseline`, `combination`) or its parameters as text."""
    settings: dict[str, Any]
    """Every setting, as `TrialConfig.to_dict` gives them."""
    params: dict[str, Any]
    """The settings that the sweep varies."""
    state: str
    """`complete`, `pruned`, `failed`, or `running` while there is no result."""
    result: dict[str, Any]
    """`result.json`; empty while running."""
    retry_of: int | None
    """Number of the failed trial that this one repeats."""
    seed_of: int | None = None
    """Number of the trial whose settings this one has with another seed."""
    wandb_id: str | None = None
    """Of its W&B run."""
    continues: int | None = None
    """Number of the trial, of a process that was lost, whose files this one goes on with."""

    @property
    def config(self) -> TrialConfig:
        return TrialConfig.from_dict(self.settings, f"{self.paths.config}: settings")

    @property
    def loss(self) -> float | None:
        """Validation loss at the best step, nats a supervised token."""
        return self.result.get(METRIC)

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl in order; a torn last line is left out."""
        return read_metrics(self.paths.metrics)

    def eval_losses(self, step: int) -> pd.DataFrame:
        """Per-example validation losses at `step`: `example_id`, `loss_sum` (nats), `num_tokens`."""
        return pd.read_parquet(self.paths.eval_losses(step))

    def samples(self) -> dict[int, list[dict[str, Any]]]:
        """Answers to the sweep's fixed prompts by step, 0 the base model's; damaged files are left out.

        Each has `prompt`, `response`, `num_tokens` (of the response) and `ended` (itself, or it was cut).
        """
        samples = {}
        for path in self.paths.samples.glob("[0-9]*.json"):
            try:
                record = read_json(path)
                step, answers = int(path.stem), record["samples"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if isinstance(answers, list) and all(_is_sample(answer) for answer in answers):
                samples[step] = answers
        return dict(sorted(samples.items()))


@dataclass
class StepCount:
    """What became of the steps of a sweep's trials."""

    trained: int = 0
    saved: int = 0
    """Taken from a stage, or from a trial with the same settings."""
    pruned: int = 0
    """Of pruned trials, those that they were not trained for."""

    def add(self, result: dict[str, Any], max_steps: int) -> None:
        """Counts a trial that has ended; `result` is its result.json."""
        num_steps, saved = result.get("num_steps") or 0, result.get("steps_saved") or 0
        self.trained += num_steps - saved
        self.saved += saved
        if result.get("state") == "pruned":
            self.pruned += max_steps - num_steps


@dataclass(frozen=True)
class SweepRecord:
    """One sweep directory."""

    paths: SweepPaths
    definition: dict[str, Any]
    all_trials: list[TrialRecord]
    """Every trial, with the failed ones that were run again."""

    @property
    def name(self) -> str:
        return self.paths.root.name

    @cached_property
    def trials(self) -> list[TrialRecord]:
        """The trials that count: without those that another trial repeats."""
        repeated = {trial.retry_of for trial in self.all_trials}
        return [trial for trial in self.all_trials if trial.number not in repeated]

    @property
    def finished(self) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.state == "complete"]

    def trial(self, number: int) -> TrialRecord:
        for trial in self.all_trials:
            if trial.number == number:
                return trial
        raise SweepError(f"{self.paths.root}: trial {number} is not there")

    def original(self, trial: TrialRecord) -> TrialRecord:
        """The trial that was trained, where this one stands for the same settings."""
        same_as = trial.result.get("same_as")
        return trial if same_as is None else self.trial(same_as)

    def best(self) -> TrialRecord:
        """The finished trial with the lowest validation loss; the first of equals.

        Of settings trained with several seeds the mean counts, and the trial is that of the first seed:
        the luckiest seed says nothing about the settings.
        """
        scored = [trial for trial in self.finished if trial.loss is not None]
        firsts = [trial for trial in scored if trial.seed_of is None] or scored
        if not firsts:
            raise SweepError(f"{self.paths.root}: no trial has finished, so there is no best one")
        losses = {trial.number: self.seed_losses(trial) for trial in firsts}
        # A mean is not compared with one lucky seed: that of a setting which the final round left out.
        # Nor does a trial become the best one because somebody has asked for more seeds of it: a final round
        # has the trial of the lowest loss among its own.
        several = [trial for trial in firsts if len(losses[trial.number]) > 1]
        leader = min(firsts, key=lambda trial: (trial.loss or 0.0, trial.number))
        return min(
            several if leader in several else firsts,
            key=lambda trial: (statistics.mean(losses[trial.number]), trial.number),
        )

    def seed_losses(self, trial: TrialRecord) -> list[float]:
        """Losses of the trial and of its further seeds."""
        return [
            other.loss
            for other in self.finished
            if other.loss is not None and trial.number in (other.number, other.seed_of)
        ]


def read_sweep(root: str | Path) -> SweepRecord:
    """Reads `runs/<sweep>/`.

    Raises:
        SweepError: the directory is missing, or holds no sweep definition.
    """
    paths = SweepPaths(Path(root))
    if not paths.root.is_dir():
        raise SweepError(f"{paths.root} is not a directory, but must be a sweep's (runs/NAME)")
    if not paths.definition.is_file():
        raise SweepError(
            f"{paths.root} has no {paths.definition.name}, so it is not a sweep directory"
        )
    definition = yaml.safe_load(paths.definition.read_text("utf-8")) or {}
    directories = sorted(paths.trials.glob("[0-9]*")) if paths.trials.is_dir() else []
    trials = [
        read_trial(TrialPaths(path)) for path in directories if TrialPaths(path).config.is_file()
    ]
    return SweepRecord(paths, definition, sorted(trials, key=lambda trial: trial.number))


def read_trial(paths: TrialPaths) -> TrialRecord:
    """Reads one trial directory; `config.json` must be there.

    Raises:
        SweepError: a file is damaged (ours are written whole or not at all).
    """
    config = _read_record(paths.config)
    result = _read_record(paths.result) if paths.result.is_file() else {}
    return TrialRecord(
        number=int(config.get("number", 0)),
        paths=paths,
        name=config.get("name") or paths.root.name,
        settings=config["settings"],
        params=config.get("params", {}),
        state=result.get("state", "running"),
        result=result,
        retry_of=config.get("retry_of"),
        seed_of=config.get("seed_of"),
        wandb_id=config.get("wandb_id"),
        continues=config.get("continues"),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; lines that are not whole JSON objects are skipped."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _is_sample(value: Any) -> bool:
    kinds = {"prompt": str, "response": str, "num_tokens": int, "ended": bool}
    return isinstance(value, dict) and all(
        isinstance(value.get(name), kind) for name, kind in kinds.items()
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:  # not JSON, or not UTF-8
        raise SweepError(f"{path}: is damaged, but must be whole JSON: {error}") from None
