"""Settings that act together are found where they do, and the report says where it cannot tell."""

import itertools

import numpy as np
import pytest

from analysis.interactions import MIN_TRIALS, interaction_sentence, interactions, levels_of

NAMES = ["learning_rate", "lora_r", "lr_scheduler_type"]
GRID = [
    dict(zip(NAMES, point, strict=True))
    for point in itertools.product([1e-4, 1e-3, 1e-2], [8, 16, 32], ["cosine", "linear", "wsd"])
]


def losses_of(strength: float, seed: int = 0) -> list[float]:
    """Loss falls with the rate and the rank, and their product counts `strength` times."""
    noise = np.random.default_rng(seed).normal(0, 0.01, len(GRID))
    found = []
    for point, error in zip(GRID, noise, strict=True):
        rate, rank = np.log10(point["learning_rate"]) + 3, np.log2(point["lora_r"]) - 4
        found.append(2 - 0.1 * rate - 0.05 * rank + strength * rate * rank + error)
    return found


def test_a_pair_that_acts_together_is_found_with_its_share_of_the_variance():
    losses = losses_of(0.1)
    found = interactions(GRID, losses, NAMES)
    assert found is not None
    assert found[0].settings == ("learning_rate", "lora_r")
    # Variances on the grid: 0.1**2 * 2/3, 0.05**2 * 2/3 and 0.1**2 * 4/9, and that of the noise.
    expected = 0.1**2 * 4 / 9 / (0.0125 * 2 / 3 + 0.1**2 * 4 / 9 + 0.0001)
    assert found[0].share == pytest.approx(expected, abs=0.04)
    assert [item.is_detected for item in found] == [True, False, False]
    sentence = interaction_sentence(found, len(GRID), 3)
    assert f"over 27 trials): learning_rate x lora_r {found[0].share:.0%}." in sentence


def test_a_pair_in_noise_is_called_real_in_about_five_of_a_hundred_studies():
    real = 0
    for seed in range(200):
        found = interactions(GRID, losses_of(0.0, seed), NAMES)
        real += any(item.is_detected for item in found or [])
    assert real <= 20


def test_main_effects_alone_are_no_detectable_interaction():
    found = interactions(GRID, losses_of(0.0), NAMES)
    assert interaction_sentence(found, len(GRID), 3).startswith("No detectable interaction")


def test_too_few_trials_say_so():
    few = MIN_TRIALS - 1
    assert interactions(GRID[:few], losses_of(0.1)[:few], NAMES) is None
    assert interaction_sentence(None, few, 3) == (
        "Whether settings act together (interactions): 19 trials are too few to tell "
        "(at least 20 are needed)."
    )
    assert interaction_sentence(None, few, 1) == ""


def test_settings_that_always_move_together_are_not_called_a_pair():
    points = [{"a": n, "b": n} for n in range(1, 31)]
    found = interactions(points, list(np.random.default_rng(0).normal(2, 0.1, 30)), ["a", "b"])
    assert not any(item.is_detected for item in found or [])


def test_many_values_are_cut_into_ranges_of_about_as_many_trials():
    assert levels_of(np.array([4.0, 1, 2, 4]), 5).tolist() == [2, 0, 1, 2]
    assert np.bincount(levels_of(np.arange(100.0), 5)).tolist() == [20] * 5
