"""Tokenised examples as two flat arrays, and the order in which a trial takes them.

`Examples` reads a split once, so that a batch costs two slices. `BatchOrder` gives the examples of every
optimizer step as a pure function of seed and step: Transformers' Trainer's order, without its state.
"""

import functools
import math

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from training.chat import IGNORE

Sequence = tuple[np.ndarray, np.ndarray]
"""`(input_ids, labels)` of one example, both int [T]."""


class Examples:
    """The `input_ids` and `labels` of a split.

    Args:
        dataset: columns `example_id`, `input_ids`, `labels` (-100: not supervised).
    """

    def __init__(self, dataset: Dataset):
        self.ids: list[str] = list(dataset["example_id"])
        self.tokens, self.offsets = _flat(dataset, "input_ids")
        self.labels, _ = _flat(dataset, "labels")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sequence:
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.tokens[start:end], self.labels[start:end]

    @functools.cached_property
    def num_supervised(self) -> np.ndarray:
        """Supervised tokens of every example; its first token is never predicted."""
        counts = np.add.reduceat(self.labels != IGNORE, self.offsets[:-1], dtype=np.int64)
        return counts - (self.labels[self.offsets[:-1]] != IGNORE)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every example."""
        return np.diff(self.offsets)


class BatchOrder:
    """Which examples each optimizer step trains on.

    An epoch is a permutation seeded by `seed` plus its number (Accelerate's SeedableRandomSampler); its
    last batch may be smaller, its last step may have fewer micro-batches, and none spans two epochs.

    Args:
        num_examples: of the train split.
        batch_size: sequences in a micro-batch.
        accumulation: micro-batches in a step.
        seed: the trial's.
    """

    def __init__(self, num_examples: int, batch_size: int, accumulation: int, seed: int):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.step_size = batch_size * accumulation
        self.steps_per_epoch = math.ceil(math.ceil(num_examples / batch_size) / accumulation)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """Indices of each micro-batch of optimizer step `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = torch.randperm(self.num_examples, generator=generator).numpy()
            self._epoch = epoch
        taken = self._order[place * self.step_size : (place + 1) * self.step_size]
        return [
            taken[start : start + self.batch_size]
            for start in range(0, len(taken), self.batch_size)
        ]


def _flat(dataset: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a list column in one array, and the offsets at which each row begins."""
    lists = dataset.with_format("arrow")[:][column]
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy(zero_copy_only=False)
    return values, offsets
