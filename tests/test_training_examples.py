"""The order of the data against the Trainer's own loader, and what a split looks like as arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from training.examples import BatchOrder, Examples


def trainer_order(
    num: int, batch: int, accumulation: int, seed: int, steps: int, directory: Path
) -> list[list[int]]:
    """Which examples transformers.Trainer trains on, step by step."""
    seen: list[list[int]] = []

    class Recorder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, index: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(index.tolist())
            return {"loss": (self.weight * labels.float()).sum()}

    trainer: Any = transformers.Trainer(
        model=Recorder(),
        args=transformers.TrainingArguments(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            seed=seed,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"index": range(num), "labels": [0] * num}),
    )
    trainer.train()
    return seen


@pytest.mark.parametrize(
    ("num", "batch", "accumulation"), [(10, 3, 1), (10, 3, 2), (7, 2, 3), (5, 8, 2)]
)
def test_batches_are_those_of_the_trainer(
    num: int, batch: int, accumulation: int, tmp_path: Path
) -> None:
    theirs = trainer_order(num, batch, accumulation, 11, 9, tmp_path)
    order = BatchOrder(num, batch, accumulation, 11)
    ours = [indices.tolist() for step in range(9) for indices in order.micro_batches(step)]
    assert ours == theirs


@settings(deadline=None)
@given(
    num=st.integers(1, 40),
    batch=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_an_epoch_takes_every_example_once(
    num: int, batch: int, accumulation: int, epoch: int
) -> None:
    order = BatchOrder(num, batch, accumulation, 3)
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    taken = np.concatenate([indices for step in steps for indices in order.micro_batches(step)])
    assert sorted(taken) == list(range(num))


def test_steps_may_be_asked_for_in_any_order() -> None:
    order, other = BatchOrder(9, 2, 2, 5), BatchOrder(9, 2, 2, 5)
    forward = [[batch.tolist() for batch in order.micro_batches(step)] for step in range(12)]
    backward = [
        [batch.tolist() for batch in other.micro_batches(step)] for step in reversed(range(12))
    ]
    assert forward == backward[::-1]


def test_examples_are_the_rows_of_the_dataset() -> None:
    rows = [
        {"example_id": "a", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"example_id": "b", "input_ids": [4, 5], "labels": [4, 5]},
        {"example_id": "c", "input_ids": [6], "labels": [-100]},
    ]
    examples = Examples(Dataset.from_list(rows).select([0, 1, 2]))
    assert len(examples) == 3
    assert [[part.tolist() for part in examples[n]] for n in range(3)] == [
        [row["input_ids"], row["labels"]] for row in rows
    ]
    assert examples.lengths.tolist() == [3, 2, 1]
    assert examples.num_supervised.tolist() == [2, 1, 0]  # a first token is never predicted


def test_a_selection_of_a_dataset_is_read_as_selected() -> None:
    rows = [
        {"example_id": str(n), "input_ids": [n] * (n + 1), "labels": [n] * (n + 1)}
        for n in range(5)
    ]
    examples = Examples(Dataset.from_list(rows).select([4, 1]))
    assert [examples[n][0].tolist() for n in range(2)] == [[4] * 5, [1, 1]]
