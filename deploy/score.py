"""The one test score of a trial: base and adapter on the test split, kept per example; and the gate.

The test split is looked at once, for the gate of promotion; what was scored stays in the trial's
`test/<step>.parquet` and `result.json`, and is read back the next time.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
from datasets import Dataset

from analysis.stats import MIN_EXAMPLES, Interval, difference_interval
from deploy.merge import load_with_adapter
from sweeps.ledger import TrialRecord
from training.data import DataSplits, load_splits
from training.evaluate import example_losses, mean_loss
from training.exceptions import GateError, SweepError
from training.paths import write_atomic, write_json

CONFIDENCE = 0.95
TEST_LOSS, BASE_TEST_LOSS = "test/loss", "base_test/loss"


@dataclass(frozen=True)
class TestScore:
    """Per-example test losses: `example_id`, `loss_sum` (nats), `num_tokens`."""

    __test__ = False  # Not a pytest class.

    adapter: pd.DataFrame
    base: pd.DataFrame
    scored_before: bool


@dataclass(frozen=True)
class Comparison:
    """A model and its base on the same test examples, in nats a token."""

    tuned: float
    base: float
    interval: Interval
    """Of tuned minus base."""
    num_examples: int

    def __str__(self) -> str:
        interval = self.interval
        return (
            f"{interval.estimate:+.4f}, {CONFIDENCE:.0%} interval "
            f"[{interval.low:+.4f}, {interval.high:+.4f}]"
        )


def check_gate(
    tuned: pd.DataFrame,
    base: pd.DataFrame,
    tuned_name: str = "the adapter",
    base_name: str = "its base model",
) -> Comparison:
    """Compares test losses: all of the interval of their difference must be below 0.

    Raises:
        GateError: the tuned model does not beat its base, or the examples are too few to tell.
    """
    interval = difference_interval(tuned, base, confidence=CONFIDENCE)
    comparison = Comparison(mean_loss(tuned), mean_loss(base), interval, len(base))
    if len(base) < MIN_EXAMPLES:
        raise GateError(
            f"the test split has {len(base)} examples, but must have at least {MIN_EXAMPLES} to tell "
            f"whether {tuned_name} beats {base_name}; a larger test_fraction or max_eval_samples, "
            "or more data, makes it larger"
        )
    if not interval.high < 0:
        raise GateError(
            f"{tuned_name} does not beat {base_name} on {len(base)} test examples: test loss differs "
            f"by {comparison}, but all of it must be below 0"
        )
    return comparison


def load_held_out(trial: TrialRecord, tokenizer: Any) -> DataSplits:
    """The splits that the trial was trained with.

    Raises:
        SweepError: the data has changed since the trial ran, so the split is another one.
    """
    splits = load_splits(trial.config, tokenizer)
    for name in ("train_hash", "test_hash"):
        expected, found = trial.result.get(name), splits.hashes[name]
        if expected != found:
            raise SweepError(
                f"{trial.paths.root}: {name} is {expected}, but the data now gives {found}: the "
                "dataset has changed since the trial ran, so it has no held-out test split"
            )
    return splits


def score_on_test(trial: TrialRecord, test: Dataset) -> TestScore:
    """Scores base and adapter, or reads the scores of the first time."""
    step = trial.result["best_step"]
    adapter_file, base_file = trial.paths.test_losses(step), trial.paths.test_losses(0)
    known = {TEST_LOSS, BASE_TEST_LOSS} <= trial.result.keys()
    if known and adapter_file.is_file() and base_file.is_file():
        return TestScore(pd.read_parquet(adapter_file), pd.read_parquet(base_file), True)
    score = _score(trial, test)
    write_atomic(base_file, score.base.to_parquet)
    write_atomic(adapter_file, score.adapter.to_parquet)
    trial.result[TEST_LOSS] = mean_loss(score.adapter)
    trial.result[BASE_TEST_LOSS] = mean_loss(score.base)
    write_json(trial.paths.result, trial.result)
    return score


def _score(trial: TrialRecord, test: Dataset) -> TestScore:
    config = trial.config
    model = load_with_adapter(config, trial.paths.adapter)
    batch_size = config.per_device_eval_batch_size
    # The inner model is the Transformers one, with the adapter in its layers.
    inner: Any = model.get_base_model()
    adapter = example_losses(inner, test, batch_size)
    with model.disable_adapter():
        base = example_losses(inner, test, batch_size)
    return TestScore(adapter, base, False)
