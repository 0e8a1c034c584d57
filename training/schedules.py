"""Learning rate as a pure function of the step: Transformers' schedules, without their optimizer.

`learning_rate(config, step)` is the rate that optimizer step `step` uses, counted from 0. Formulas are
those of `transformers.optimization` (linear, cosine, constant, constant_with_warmup, warmup_stable_decay).
`shared_steps(a, b)` says on how many first steps two trials are the same computation. To explore steps,
take `warmup_stable_decay` (Hägele et al. 2024, arXiv 2405.18392): its rate depends on `max_steps` in the
cooldown alone, a share of `max_steps`, so that trials of different length share all that comes before.
"""

import math
from typing import Any

from training.config import TrialConfig


def learning_rate(config: TrialConfig, step: int) -> float:
    """Rate of one optimizer step.

    Args:
        config: `learning_rate` is the peak; `lr_scheduler_type`, `warmup_steps` and `max_steps` shape it.
        step: counted from 0; from `max_steps` on, the schedule's last value.
    """
    return config.learning_rate * _factor(config, step)


def num_decay_steps(config: TrialConfig) -> int:
    """Steps of the cooldown of `warmup_stable_decay`: `decay_fraction` of `max_steps`, after warmup."""
    return min(
        round(config.decay_fraction * config.max_steps),
        max(0, config.max_steps - config.warmup_steps),
    )


def scheduler_kwargs(config: TrialConfig) -> dict[str, Any]:
    """TRL's `lr_scheduler_kwargs` for the same schedule."""
    if config.lr_scheduler_type != "warmup_stable_decay":
        return {}
    return {"num_decay_steps": num_decay_steps(config), "decay_type": config.decay_type}


SCHEDULE_SETTINGS = (
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "decay_fraction",
    "decay_type",
)
"""They enter an update through the learning rates alone."""

_NOT_IN_AN_UPDATE = ("gradient_checkpointing", "per_device_eval_batch_size")


def other_settings(config: TrialConfig) -> dict[str, Any]:
    """The settings that must be equal for two trials to share a step, or its evaluation."""
    left_out = {*SCHEDULE_SETTINGS, *_NOT_IN_AN_UPDATE}
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def shared_steps(a: TrialConfig, b: TrialConfig) -> int:
    """On how many first steps the two are the same computation: equal settings, data and rates.

    With a linear or cosine schedule it is a step or two, whatever the number of steps; with a constant
    one all steps of the shorter trial; with `warmup_stable_decay` those before its cooldown.
    """
    if other_settings(a) != other_settings(b):
        return 0
    steps = min(a.max_steps, b.max_steps)
    differing = (s for s in range(steps) if learning_rate(a, s) != learning_rate(b, s))
    return next(differing, steps)


def is_cooling_down(config: TrialConfig, step: int) -> bool:
    """Whether one of the first `step` steps had a rate that `warmup_stable_decay` had lowered.

    The first step of a cooldown still has the full rate.
    """
    is_stable = config.lr_scheduler_type == "warmup_stable_decay"
    return is_stable and step > config.max_steps - num_decay_steps(config) + 1


def _factor(config: TrialConfig, step: int) -> float:
    """Share of the peak."""
    warmup, total = config.warmup_steps, config.max_steps
    if config.lr_scheduler_type == "constant":
        return 1.0  # Transformers' constant has no warmup
    if step < warmup:
        return step / warmup
    if config.lr_scheduler_type == "constant_with_warmup":
        return 1.0
    if config.lr_scheduler_type == "warmup_stable_decay":
        return _cooldown(config, step)
    progress = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return max(0.0, (total - step) / max(1, total - warmup))


def _cooldown(config: TrialConfig, step: int) -> float:
    decay = num_decay_steps(config)
    elapsed = step - (config.max_steps - decay)
    if elapsed < 0:
        return 1.0
    if elapsed >= decay:
        return 0.0
    progress = elapsed / decay
    return 1 - (math.sqrt(progress) if config.decay_type == "1-sqrt" else progress)
