"""Who is tied with the best, against scipy's paired t test; what several seeds say."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sweeps.ledger import SweepRecord, TrialRecord
from sweeps.ties import describe_seeds, tied_with_best, worse_p_value
from training.paths import SweepPaths

NUM_TOKENS = np.full(40, 6)


def record_of(
    root: Path, losses: list[np.ndarray], seed_of: dict[int, int] | None = None
) -> SweepRecord:
    """Finished trials with these losses of their examples, nats a token."""
    paths = SweepPaths(root)
    trials = []
    for number, own in enumerate(losses):
        result = {"state": "complete", "eval/loss": float(own.mean()), "best_step": 5}
        trial = TrialRecord(
            number, paths.trial(number), f"t{number}", {}, {}, "complete", result, None,
            (seed_of or {}).get(number),
        )  # fmt: skip
        write(trial, own, NUM_TOKENS)
        trials.append(trial)
    return SweepRecord(paths, {}, trials)


def write(trial: TrialRecord, losses: np.ndarray, num_tokens: np.ndarray) -> None:
    path = trial.paths.eval_losses(5)
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"e{number}" for number in range(len(losses))]
    table = {"example_id": ids, "loss_sum": losses * num_tokens, "num_tokens": num_tokens}
    pd.DataFrame(table).to_parquet(path)


def draw(mean: float, spread: float, seed: int) -> np.ndarray:
    examples = np.random.default_rng(0).normal(0, 1, len(NUM_TOKENS))
    return mean + examples + np.random.default_rng(seed).normal(0, spread, len(NUM_TOKENS))


@pytest.mark.parametrize("gap", [-0.05, 0.0, 0.02, 0.1])
def test_with_examples_of_one_length_it_is_the_paired_t_test(tmp_path: Path, gap: float) -> None:
    best, other = draw(2, 0.1, 1), draw(2 + gap, 0.1, 2)
    record = record_of(tmp_path, [best, other])
    expected = stats.ttest_rel(other, best, alternative="greater").pvalue  # pyright: ignore
    assert worse_p_value(record.trial(1), record.trial(0)) == pytest.approx(expected, rel=1e-9)


def test_losses_over_other_tokens_are_not_compared(tmp_path: Path) -> None:
    record = record_of(tmp_path, [draw(2, 0.1, 1), draw(5, 0.1, 2)])
    assert worse_p_value(record.trial(1), record.trial(0)) < 1e-6
    write(record.trial(1), draw(5, 0.1, 2), NUM_TOKENS + 1)
    assert worse_p_value(record.trial(1), record.trial(0)) == 1


def test_the_best_is_tied_with_what_is_within_noise_by_holms_rule(tmp_path: Path) -> None:
    best = draw(2, 0.1, 1)
    losses = [best + 0.5, best, best + np.linspace(-0.1, 0.11, len(best)), best + 0.3]
    assert [trial.number for trial in tied_with_best(record_of(tmp_path, losses))] == [1, 2]


def test_one_lucky_seed_is_not_better_than_a_mean(tmp_path: Path) -> None:
    flat = np.ones(len(NUM_TOKENS))
    losses = [2.4 * flat, 2.5 * flat, 2.6 * flat, 2.45 * flat]
    record = record_of(tmp_path, losses, seed_of={2: 0, 3: 0})
    assert record.seed_losses(record.trial(0)) == pytest.approx([2.4, 2.6, 2.45])
    assert record.best().number == 0  # 2.483 in the mean; trial 1 has a single seed
    record = record_of(tmp_path, losses, seed_of={2: 0, 3: 1})
    assert record.best().number == 1  # 2.475 to 2.5


def test_the_interval_over_seeds_is_students(tmp_path: Path) -> None:
    flat = np.ones(len(NUM_TOKENS))
    record = record_of(tmp_path, [2.4 * flat, 2.6 * flat, 2.45 * flat], seed_of={1: 0, 2: 0})
    values = [2.4, 2.6, 2.45]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    (line,) = describe_seeds(record)
    assert line == f"trial 0 t0: {np.mean(values):.4f} ± {(high - low) / 2:.4f} over 3 seeds"
