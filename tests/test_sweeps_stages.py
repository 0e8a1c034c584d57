"""Where trials part, and what a user sees of the stages."""

import subprocess
import sys
from pathlib import Path

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from sweeps.stages import MOST_BRANCHES, branch_points
from training.config import TrialConfig
from training.paths import SweepPaths, write_json, write_text

STEPS = CategoricalDistribution([5, 20, 30, 60])


def trial(**settings: object) -> TrialConfig:
    stable = {"lr_scheduler_type": "warmup_stable_decay", "eval_steps": 5}
    return TrialConfig.from_dict({**stable, **settings})


@pytest.mark.parametrize(
    ("max_steps", "points"),
    [(5, (5,)), (20, (5, 17)), (30, (5, 17, 25)), (60, (5, 17, 25))],
)
def test_trials_part_at_their_cooldowns(max_steps: int, points: tuple[int, ...]) -> None:
    space: dict[str, BaseDistribution] = {
        "max_steps": STEPS,
        "lora_r": CategoricalDistribution([8, 16]),
    }
    assert branch_points(space, trial(max_steps=max_steps)) == points


def test_schedules_that_share_a_step_or_none_have_no_stages() -> None:
    assert (
        branch_points({"max_steps": STEPS}, trial(max_steps=60, lr_scheduler_type="linear")) == ()
    )
    rates = {"learning_rate": CategoricalDistribution([1e-4, 2e-4])}
    assert branch_points(dict(rates), trial(max_steps=60)) == ()


def test_where_a_setting_varies_continuously_nothing_is_stored() -> None:
    """No two trials have the same rate, so nobody could fork."""
    rate = FloatDistribution(1e-5, 1e-2, log=True)
    assert branch_points({"max_steps": STEPS, "learning_rate": rate}, trial(max_steps=60)) == ()


def test_a_wide_range_of_steps_is_cut_at_few_evaluations() -> None:
    space: dict[str, BaseDistribution] = {"max_steps": IntDistribution(10, 400)}
    points = branch_points(space, trial(max_steps=400))
    assert 1 < len(points) <= MOST_BRANCHES
    assert all(point % 5 == 0 for point in points)


def test_stages_are_listed_with_who_forked_them_and_deleted(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path / "x")
    write_text(paths.definition, "method: grid\n")
    settings = trial(max_steps=60).to_dict()
    for name, step in (("aaaa", 17), ("bbbb", 25)):
        stage = {"step": step, "prefix": name, "trial": "0003", "settings": settings}
        write_json(paths.stages / name / "stage.json", stage)
    origin = {"stage": "aaaa", "step": 17, "trial": "0003"}
    result = {"state": "complete", "eval/loss": 2.0, "forked_from": origin, "steps_saved": 17}
    write_json(paths.trial(1).config, {"settings": settings, "number": 1})
    write_json(paths.trial(1).result, result)

    def command(*options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sweeps.stages", str(paths.root), *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    lines = command().splitlines()
    assert any(line.split()[:4] == ["aaaa", "17", "0003", "1"] for line in lines)
    assert any(line.split()[:4] == ["bbbb", "25", "0003", "-"] for line in lines)
    assert lines[-1].startswith("2 stages") and lines[-1].endswith("17 steps saved by forking them")
    assert command("--delete").startswith("2 stages deleted")
    assert not paths.stages.exists() and paths.trial(1).result.is_file()
