"""The one test score of a trial: base and adapter on the test split, kept per example.

The test split is looked at once, for the gates of promotion, and with it as many examples that the trial
was trained on; what was scored stays in the trial's `test/`, `train/` and `result.json`, and is read back the
next time.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from analysis.stats import Interval, difference_interval
from deploy.merge import load_with_adapter
from sweeps.ledger import TrialRecord
from training.data import DataSplits, load_splits
from training.evaluate import example_losses, mean_loss
from training.examples import BatchOrder
from training.exceptions import SweepError
from training.paths import write_atomic, write_json

CONFIDENCE = 0.95
TEST_LOSS, BASE_TEST_LOSS = "test/loss", "base_test/loss"


@dataclass(frozen=True)
class TestScore:
    """Per-example losses: `example_id`, `loss_sum` (nats), `num_tokens`."""

    __test__ = False  # Not a pytest class.

    adapter: pd.DataFrame
    base: pd.DataFrame
    adapter_train: pd.DataFrame
    """On examples that the trial was trained on."""
    base_train: pd.DataFrame
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


def compare(tuned: pd.DataFrame, base: pd.DataFrame) -> Comparison:
    """Both must be of the same examples."""
    interval = difference_interval(tuned, base, confidence=CONFIDENCE)
    return Comparison(mean_loss(tuned), mean_loss(base), interval, len(base))


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


def score_on_test(trial: TrialRecord, splits: DataSplits) -> TestScore:
    """Scores base and adapter, or reads the scores of the first time."""
    paths, step = trial.paths, trial.result["best_step"]
    files = [
        paths.test_losses(step),
        paths.test_losses(0),
        paths.train_losses(step),
        paths.train_losses(0),
    ]
    known = {TEST_LOSS, BASE_TEST_LOSS} <= trial.result.keys()
    if known and all(file.is_file() for file in files):
        return TestScore(*map(pd.read_parquet, files), scored_before=True)
    score = _score(trial, splits.test, trained_on(trial, splits.train, len(splits.test)))
    frames = [score.adapter, score.base, score.adapter_train, score.base_train]
    for file, losses in zip(files, frames, strict=True):
        write_atomic(file, losses.to_parquet)
    trial.result[TEST_LOSS] = mean_loss(score.adapter)
    trial.result[BASE_TEST_LOSS] = mean_loss(score.base)
    write_json(paths.result, trial.result)
    return score


def trained_on(trial: TrialRecord, train: Dataset, most: int) -> Dataset:
    """Up to `most` examples that the trial was trained on until its best step, spread over that time.

    In the first epoch's order; after it, all were seen.
    """
    config = trial.config
    order = BatchOrder(
        len(train),
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.seed,
    )
    steps = range(min(trial.result["best_step"], order.steps_per_epoch))
    seen = np.concatenate([batch for step in steps for batch in order.micro_batches(step)])
    places = np.unique(np.linspace(0, len(seen) - 1, min(most, len(seen))).astype(int))
    return train.select(seen[places].tolist())


def _score(trial: TrialRecord, test: Dataset, train: Dataset) -> TestScore:
    config = trial.config
    model = load_with_adapter(config, trial.paths.adapter)
    batch_size = config.per_device_eval_batch_size
    # The inner model is the Transformers one, with the adapter in its layers.
    inner: Any = model.get_base_model()
    adapter, adapter_train = (example_losses(inner, data, batch_size) for data in (test, train))
    with model.disable_adapter():
        base, base_train = (example_losses(inner, data, batch_size) for data in (test, train))
    return TestScore(adapter, base, adapter_train, base_train, False)
