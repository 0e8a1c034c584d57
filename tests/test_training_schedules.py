"""Schedules against Transformers' own."""

from typing import Any

import pytest
import torch
import transformers

from training.config import TrialConfig
from training.schedules import learning_rate, num_decay_steps, scheduler_kwargs

SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"]


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("decay_type", ["1-sqrt", "linear"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_transformers(schedule: str, decay_type: str, warmup_steps: int) -> None:
    config = TrialConfig.from_dict(
        {
            "lr_scheduler_type": schedule,
            "warmup_steps": warmup_steps,
            "decay_type": decay_type,
            "max_steps": 23,
            "learning_rate": 3e-4,
        }
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    theirs: Any = transformers.get_scheduler(
        schedule, optimizer, warmup_steps, config.max_steps, scheduler_kwargs(config)
    )
    expected = []
    for _ in range(config.max_steps):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [learning_rate(config, step) for step in range(config.max_steps)]
    assert ours == pytest.approx(expected, rel=1e-12)


def test_the_cooldown_is_a_share_of_the_steps_after_warmup() -> None:
    def decay(**settings: Any) -> int:
        return num_decay_steps(TrialConfig.from_dict(settings))

    assert decay(max_steps=60) == 12
    assert decay(max_steps=60, decay_fraction=0.5) == 30
    assert decay(max_steps=10, decay_fraction=1, warmup_steps=4) == 6
    assert decay(max_steps=3, warmup_steps=9) == 0
