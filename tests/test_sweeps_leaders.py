"""The lowest held-out loss at a step leads; what an earlier start has logged counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeps.leaders import Leaders
from sweeps.run import RunOptions, run_sweep
from sweeps.spec import read_definition
from training.config import TrialConfig
from training.exceptions import ConfigError
from training.paths import SweepPaths, write_json


def make_sweep(root: Path, losses: list[float | None]) -> SweepPaths:
    """One trial a loss, evaluated at step 4."""
    paths = SweepPaths(root / "sweep")
    paths.root.mkdir()
    paths.definition.write_text("method: grid\n")
    for number, loss in enumerate(losses):
        trial = paths.trial(number)
        write_json(trial.config, {"settings": TrialConfig().to_dict(), "number": number})
        trial.metrics.write_text(
            json.dumps({"step": 3, "train/loss": 0.1})
            + "\n"
            + json.dumps({"step": 4, "eval/loss": loss})
            + "\n"
        )
    return paths


def test_the_lowest_loss_at_a_step_leads(tmp_path: Path) -> None:
    leaders = Leaders(make_sweep(tmp_path, []))
    calls = [(4, 2.0), (4, 2.5), (8, 2.4), (4, 1.9), (4, 1.95)]
    assert [leaders.takes_lead(*call) for call in calls] == [True, False, True, True, False]


def test_what_is_on_disk_counts_and_a_trial_does_not_beat_itself(tmp_path: Path) -> None:
    paths = make_sweep(tmp_path, [1.5, 1.25, None])
    assert Leaders(paths).takes_lead(4, 1.25)  # trial 1, whose loss is in its own file by now
    assert not Leaders(paths).takes_lead(4, 1.5)
    assert Leaders(paths).takes_lead(8, 9.0)


@pytest.mark.slow
def test_leaders_are_sampled_in_a_workers_pack(
    tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    constants = {**tiny_settings, "max_steps": 8, "lora_r": 4}
    parameters: dict[str, Any] = {name: {"value": value} for name, value in constants.items()}
    parameters["learning_rate"] = {"values": [1e-2, 1e-6]}
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}), encoding="utf-8")
    options = RunOptions(
        output_dir=str(tmp_path / "runs"), report_to="none", slots=1, workers=1, num_samples=2
    )
    record = run_sweep(read_definition(str(path)), options)
    best, other = sorted(record.trials, key=lambda trial: trial.loss or 0.0)
    samples = best.samples()
    assert {0, best.result["best_step"]} <= set(samples)
    prompts = {tuple(sample["prompt"] for sample in answers) for answers in samples.values()}
    assert len(prompts) == 1
    assert [len(answers) for answers in samples.values()] == [2] * len(samples)
    assert other.number < best.number or other.samples() == {}


def test_a_negative_number_of_samples_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("method: grid\nparameters: {lora_r: {values: [4, 8]}}\n")
    with pytest.raises(ConfigError, match="--num_samples is -1, but must be >= 0"):
        run_sweep(read_definition(str(path)), RunOptions(num_samples=-1))
