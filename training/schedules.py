"""Learning rate as a pure function of the step: Transformers' schedules, without their optimizer.

`learning_rate(config, step)` is the rate that optimizer step `step` uses, counted from 0. Formulas are
those of `transformers.optimization` (linear, cosine, constant, constant_with_warmup, warmup_stable_decay).
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
