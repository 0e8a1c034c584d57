"""Importance, the value of steps, what is worth its cost: against known answers."""

import itertools

import numpy as np
import pytest
from scipy.optimize import curve_fit

from analysis.choice import LossTable
from analysis.trends import importances, pareto_front, steps_trend


def test_what_moves_the_loss_is_important_and_what_does_not_is_not() -> None:
    points = [
        {"learning_rate": rate, "lora_r": rank, "lora_target_modules": modules}
        for rate, rank, modules in itertools.product(
            [1e-4, 2e-4, 5e-4], [8, 16, 32], [["q_proj"], ["all-linear"]]
        )
    ]
    effect = {1e-4: 0.3, 2e-4: 0.1, 5e-4: 0.0}
    rng = np.random.default_rng(0)
    losses = [
        2.5 + effect[p["learning_rate"]] + 0.05 * (p["lora_r"] == 8) + rng.normal(0, 0.001)
        for p in points
    ]
    found = importances(points, losses, ["lora_r", "learning_rate", "lora_target_modules"])
    shares = {item.setting: item for item in found}
    assert found[0].setting == "learning_rate"
    assert shares["learning_rate"].fanova > 0.8
    assert 0.01 < shares["lora_r"].fanova < 0.15
    assert shares["lora_target_modules"].fanova < 0.02
    assert shares["learning_rate"].ped_anova > shares["lora_target_modules"].ped_anova
    assert sum(item.fanova for item in found) == pytest.approx(1, abs=0.05)


def test_few_trials_and_one_setting_have_no_importance() -> None:
    points = [{"lora_r": r, "learning_rate": 1e-3} for r in (2, 4, 8, 16, 32, 64)]
    losses = [3.0, 2.9, 2.8, 2.7, 2.6, 2.5]
    assert importances(points, losses, ["lora_r", "learning_rate"]) == []
    assert importances(points[:5], losses[:5], ["lora_r"]) == []


def make(steps: list[int], noise: float, seed: int = 0) -> LossTable:
    """Losses that follow 2.4 + 2 / sqrt(steps)."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.5, (400, 1))
    means = 2.4 + 2.0 * np.array(steps, float) ** -0.5
    return LossTable(means + shared + rng.normal(0, noise, (400, len(steps))), np.ones(400))


def test_a_power_law_is_found_and_its_doubling_is_foretold() -> None:
    steps = [10, 20, 40, 80, 160]
    trend = steps_trend(steps[::-1], LossTable(make(steps, 0.0).sums_NM[:, ::-1], np.ones(400)))
    assert trend is not None
    assert trend.steps == steps
    assert trend.exponent == pytest.approx(0.5, abs=0.03)
    assert trend.scale == pytest.approx(2.0, rel=0.1)
    gain = 2.0 * (160**-0.5 - 320**-0.5)
    assert trend.doubled_steps == 320
    assert trend.gain == pytest.approx(gain, rel=0.05)
    (scale, exponent, floor), _ = curve_fit(
        lambda x, a, b, c: c + a * x**-b, trend.steps, trend.losses, p0=(1.0, 0.7, 2.0)
    )
    fitted = [floor, scale, exponent]
    assert [trend.floor, trend.scale, trend.exponent] == pytest.approx(fitted, rel=0.1)


def test_the_interval_of_the_gain_holds_it() -> None:
    steps = [10, 20, 40, 80, 160]
    gain = 2.0 * (160**-0.5 - 320**-0.5)
    held = 0
    for seed in range(60):
        trend = steps_trend(steps, make(steps, 0.3, seed), num_resamples=300)
        assert trend is not None
        held += trend.gain_low <= gain <= trend.gain_high
    assert held >= 51


def test_three_lengths_are_no_power_law() -> None:
    assert steps_trend([10, 20, 40], make([10, 20, 40], 0.1)) is None


def test_losses_that_do_not_fall_promise_nothing() -> None:
    sums = np.tile(np.array([2.5, 2.5, 2.6, 2.7]), (50, 1))
    trend = steps_trend([10, 20, 40, 80], LossTable(sums, np.ones(50)))
    assert trend is not None
    assert trend.gain == 0.0


def test_the_front_is_what_nothing_else_beats() -> None:
    points = [(2.9, 10.0), (2.8, 20.0), (2.85, 25.0), (2.7, 60.0), (2.7, 60.0), (2.75, 60.0)]
    assert pareto_front(points) == [3, 1, 0]
    assert pareto_front([(1.0,)]) == [0]
