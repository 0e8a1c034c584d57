"""Intervals agree with what can be worked out otherwise, and effects come from isolated settings only."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.stats import (
    Interval,
    corrected,
    difference_interval,
    improvement,
    loss_interval,
    main_effects,
)
from training.exceptions import DataError


def losses(loss_sum, num_tokens=None):
    num_tokens = np.ones(len(loss_sum), int) if num_tokens is None else num_tokens
    ids = [f"e{number}" for number in range(len(loss_sum))]
    return pd.DataFrame({"example_id": ids, "loss_sum": loss_sum, "num_tokens": num_tokens})


def test_the_estimate_weighs_examples_by_their_tokens():
    a, b = losses([2.0, 30.0], [1, 9]), losses([1.0, 18.0], [1, 9])
    assert difference_interval(a, b).estimate == pytest.approx((32 - 19) / 10)
    assert loss_interval(a).estimate == pytest.approx(3.2)


def test_an_interval_is_the_normal_one_where_examples_are_many():
    generator = np.random.default_rng(1)
    a, b = generator.normal(2, 1, 2000), generator.normal(1.9, 1, 2000)
    interval = difference_interval(losses(a), losses(b))
    half = 1.96 * float(np.std(a - b, ddof=1)) / math.sqrt(2000)
    assert interval.low == pytest.approx(np.mean(a - b) - half, abs=half / 10)
    assert interval.high == pytest.approx(np.mean(a - b) + half, abs=half / 10)


def test_an_interval_of_uneven_examples_is_that_of_the_ratio_estimator():
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 200, 1000)
    sums = tokens * generator.normal(1.5, 0.4, 1000)
    interval = loss_interval(losses(sums, tokens))
    mean = sums.sum() / tokens.sum()
    # Delta method, as for any ratio of sums (Cochran 1977, 2.11).
    half = 1.96 * math.sqrt(np.sum((sums - mean * tokens) ** 2)) / tokens.sum()
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half), abs=half / 8)


def test_pairing_removes_what_the_examples_have_in_common():
    generator = np.random.default_rng(3)
    difficulty = generator.normal(3, 1, 200)
    a = losses(difficulty + 0.02 + generator.normal(0, 0.01, 200))
    paired = difference_interval(a, losses(difficulty))
    assert paired.excludes_zero
    assert paired.high - paired.low < (loss_interval(a).high - loss_interval(a).low) / 20


def test_about_95_percent_of_intervals_hold_the_true_difference():
    generator = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        pair = generator.exponential(1, (2, 60))
        interval = difference_interval(losses(pair[0]), losses(pair[1]), num_resamples=300)
        held += interval.low <= 0 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


@pytest.mark.parametrize("count", [8, 16])
def test_intervals_of_few_examples_hold_the_true_difference_as_often(count):
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        pair = generator.normal(2, 1, (2, count))
        interval = difference_interval(losses(pair[0]), losses(pair[1]), num_resamples=300)
        held += interval.low <= 0 <= interval.high
    assert 0.92 <= held / 400 <= 0.98  # percentiles alone: 0.89 of 8


def test_a_corrected_confidence_holds_for_the_most_extreme_of_many_differences():
    generator = np.random.default_rng(6)
    held = 0
    for _ in range(100):
        trials = [losses(row) for row in generator.normal(2, 1, (6, 40))]
        trials.sort(key=lambda trial: trial["loss_sum"].sum())
        interval = difference_interval(trials[-1], trials[0], corrected(15), num_resamples=300)
        held += not interval.excludes_zero
    assert held >= 90  # at 95 % each: about 60
    assert corrected(1) == corrected(0) == pytest.approx(0.95)
    assert corrected(15) == pytest.approx(1 - 0.05 / 15)


def test_below_eight_examples_no_difference_is_real():
    few, enough = (
        difference_interval(losses(np.arange(n) + 9.0), losses(np.arange(n) + 1.0)) for n in (7, 8)
    )
    assert few == Interval(-np.inf, np.inf, 8.0)
    assert enough.excludes_zero


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 99)), min_size=2, max_size=24
    )
)
def test_swapping_the_models_mirrors_the_interval_and_row_order_does_not_matter(rows):
    sums_a, sums_b, tokens = (list(column) for column in zip(*rows, strict=True))
    a, b = losses(sums_a, tokens), losses(sums_b, tokens)
    forth, back = (
        difference_interval(a, b, num_resamples=50),
        difference_interval(b, a, num_resamples=50),
    )
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    shuffled = difference_interval(a, b.iloc[::-1], num_resamples=50)
    assert shuffled == forth


def test_a_model_against_itself_differs_by_exactly_nothing():
    some = losses(np.arange(9.0))
    interval = difference_interval(some, some)
    assert (interval.low, interval.high, interval.estimate) == (0, 0, 0)
    assert not interval.excludes_zero


def test_a_higher_confidence_makes_a_wider_interval():
    a, b = losses(np.arange(50.0)), losses(np.arange(50.0) ** 1.1)
    narrow, wide = (difference_interval(a, b, confidence=share) for share in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_other_examples_or_other_tokens_cannot_be_compared():
    with pytest.raises(DataError, match="2 and 3 examples have 2 in common"):
        difference_interval(losses([1.0, 2.0]), losses([1.0, 2.0, 3.0]))
    with pytest.raises(DataError, match="other numbers of tokens"):
        difference_interval(losses([1.0, 2.0], [1, 2]), losses([1.0, 2.0], [1, 3]))


def test_improvement_is_in_percent_of_the_baseline_and_negative_above_it():
    assert improvement(0.8916, 1.1774) == pytest.approx(24.27, abs=0.01)
    assert improvement(1.1, 1.0) == pytest.approx(-10)


def test_an_effect_comes_only_from_trials_that_differ_in_that_setting_alone():
    params = [
        {"max_steps": 60, "lora_r": 16},
        {"max_steps": 300, "lora_r": 16},
        {"max_steps": 300, "lora_r": 8},
        {"max_steps": 900, "lora_r": 64},
    ]
    effects = main_effects(params, [2.0, 1.5, 1.6, 0.1], ["max_steps", "lora_r"])
    assert [(e.setting, e.spread, e.best_value) for e in effects] == [
        ("max_steps", pytest.approx(0.5), 300),
        ("lora_r", pytest.approx(0.1), 16),
    ]
    assert effects[0].groups == [{60: 0, 300: 1}]


def test_a_setting_that_no_pair_isolates_has_no_effect_to_tell():
    params = [{"a": 1, "b": 1}, {"a": 2, "b": 2}]
    assert main_effects(params, [1.0, 2.0], ["a", "b"]) == []


def test_values_that_are_lists_can_be_compared():
    params = [{"lora_target_modules": ["q"]}, {"lora_target_modules": ["q", "v"]}]
    [effect] = main_effects(params, [1.0, 0.5], ["lora_target_modules"])
    assert effect.best_value == ("q", "v")
