"""The lowest held-out loss at a step leads; what an earlier start has logged counts."""

import json
from pathlib import Path

from sweeps.leaders import Leaders
from training.config import TrialConfig
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
