"""Who may be the best: error rates by simulation, and known answers."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.choice import (
    LossTable,
    chances_to_be_best,
    optimism,
    seeds_needed,
    summarize_seeds,
)
from benchmarks.statistics import draw, frames
from training.exceptions import DataError


def test_of_equal_trials_the_best_is_refused_in_one_study_of_twenty() -> None:
    rng = np.random.default_rng(0)
    refused, lone = 0.0, 0
    for _ in range(250):
        table = draw(rng, 48, np.full(9, 3.0))
        chances = chances_to_be_best(table, num_resamples=400)
        refused += (chances < 0.05).mean() / 250  # each of them is a best one
        lone += (chances >= 0.05).sum() == 1
    assert 0.03 <= refused <= 0.08
    assert lone / 250 <= 0.05


def test_two_trials_are_told_apart_as_by_a_one_sided_t_test() -> None:
    rng = np.random.default_rng(1)
    sums = rng.normal(3.0, 0.5, (200, 2)) + np.array([0.0, 0.06])
    table = LossTable(sums, np.ones(200))
    chances = chances_to_be_best(table, num_resamples=20_000)
    expected = stats.ttest_rel(sums[:, 1], sums[:, 0], alternative="greater").pvalue
    assert chances[1] == pytest.approx(expected, abs=0.01)
    assert chances[0] > 0.5


def test_a_clear_winner_is_the_only_one_left() -> None:
    table = draw(np.random.default_rng(2), 96, np.array([3.0, 3.4, 3.5, 3.6]))
    chances = chances_to_be_best(table)
    assert chances[0] >= 0.05
    assert (chances[1:] < 0.05).all()


def test_a_lone_trial_is_the_best() -> None:
    table = draw(np.random.default_rng(3), 16, np.array([3.0]))
    assert chances_to_be_best(table).tolist() == [1.0]


def test_copies_of_the_best_stay_with_it() -> None:
    table = draw(np.random.default_rng(4), 64, np.array([3.0, 3.5]))
    twice = LossTable(table.sums_NM[:, [0, 0, 1]], table.tokens_N)
    chances = chances_to_be_best(twice)
    assert (chances[:2] >= 0.05).all()
    assert chances[2] < 0.05


def test_the_estimated_optimism_is_that_of_the_choice() -> None:
    rng = np.random.default_rng(5)
    true, estimated = [], []
    for _ in range(200):
        table = draw(rng, 48, np.full(9, 3.0))
        true.append(table.losses.mean() - table.losses.min())
        estimated.append(optimism(table, num_resamples=300))
    assert np.mean(estimated) == pytest.approx(np.mean(true), rel=0.35)
    alone = draw(rng, 48, np.array([3.0]))
    assert optimism(alone) == pytest.approx(0.0, abs=0.02)


def test_losses_of_other_examples_are_refused() -> None:
    a, b = frames(draw(np.random.default_rng(6), 8, np.array([3.0, 3.1])))
    table = LossTable.of([a, b.sample(frac=1, random_state=0)])  # another order is none
    assert table.losses[1] == pytest.approx(b["loss_sum"].sum() / b["num_tokens"].sum())
    with pytest.raises(DataError, match="other examples"):
        LossTable.of([a, b.assign(example_id=[f"x{n}" for n in range(8)])])
    with pytest.raises(DataError, match="other examples"):
        LossTable.of([a, pd.concat([b, b.head(1)])])


def test_a_mean_over_seeds_has_students_interval() -> None:
    losses = [2.90, 2.93, 2.91, 2.96]
    summary = summarize_seeds(losses)
    low, high = stats.t.interval(0.95, 3, np.mean(losses), stats.sem(losses))
    assert (summary.low, summary.high) == pytest.approx((low, high))
    with pytest.raises(DataError, match="1 seeds are too few"):
        summarize_seeds([2.9])


@pytest.mark.parametrize(("effect", "number"), [(0.5, 64), (0.8, 26), (1.0, 17), (1.5, 9)])
def test_the_number_of_seeds_is_the_textbooks(effect: float, number: int) -> None:
    """Cohen 1988, table 2.4.1 (two-sided 5 %, power 80 %)."""
    assert seeds_needed(effect * 0.01, 0.01) == number


def test_no_number_of_seeds_tells_equals_apart() -> None:
    assert seeds_needed(0.0, 0.01) is None
    assert seeds_needed(1e-6, 0.01) is None
    assert seeds_needed(1.0, 1e-9) == 2
