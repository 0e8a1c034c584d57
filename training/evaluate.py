"""Held-out loss of each example, in bounded memory.

Batches are made of examples of like length; the language-model head runs at supervised positions only,
a chunk of them at a time, so logits of a whole batch never exist.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from training.chat import IGNORE
from training.exceptions import ModelError
from training.head import output_logits, token_losses


def example_losses(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> pd.DataFrame:
    """Loss of every example.

    Args:
        model: causal language model, with or without LoRA layers in it.
        dataset: columns `example_id`, `input_ids`, `labels` (-100: not supervised).
        batch_size: sequences at a time.

    Returns:
        Columns `example_id` (text), `loss_sum` (float64, nats over supervised tokens) and
        `num_tokens` (int64, supervised tokens), in the dataset's order.

    Raises:
        ModelError: the model computes its logits in a way that is not known here.
    """
    ids, labels = dataset["input_ids"], dataset["labels"]
    order = sorted(range(len(dataset)), key=lambda n: len(ids[n]))
    loss_sum = torch.zeros(len(dataset), dtype=torch.float64)
    num_tokens = torch.zeros(len(dataset), dtype=torch.int64)
    with torch.no_grad(), _eval_mode(model):
        check_head(model, ids[order[0]][:8] if order else [])
        # Longest first: what does not fit in memory fails at once.
        for start in range(0, len(order), batch_size):
            rows = order[::-1][start : start + batch_size]
            sums, counts = _batch_losses(model, [ids[n] for n in rows], [labels[n] for n in rows])
            loss_sum[rows], num_tokens[rows] = sums, counts
    return pd.DataFrame(
        {
            "example_id": list(dataset["example_id"]),
            "loss_sum": loss_sum.numpy(),
            "num_tokens": num_tokens.numpy(),
        }
    )


def mean_loss(losses: pd.DataFrame) -> float:
    """Mean over all supervised tokens, in nats."""
    return float(losses["loss_sum"].to_numpy().sum() / losses["num_tokens"].to_numpy().sum())


def check_head(model: PreTrainedModel, ids: list[int]) -> None:
    """Compares `training.head.output_logits` with the model's own forward on a few tokens.

    Raises:
        ModelError: they differ. Architectures treat the head's output in ways of their own; a loss
            computed otherwise would look plausible and be wrong.
    """
    if not ids:
        return
    ids_ST = torch.tensor([ids])
    mask_ST = torch.ones_like(ids_ST)
    ours = output_logits(model, _hidden_states(model, ids_ST, mask_ST)[0])
    own = model(
        input_ids=ids_ST.to(model.device), attention_mask=mask_ST.to(model.device), use_cache=False
    ).logits[0]
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not torch.allclose(ours, own.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ModelError(
            f"model_name_or_path: {type(model).__name__} computes its logits in a way that held-out "
            "loss does not know, so it cannot be used"
        )


def _batch_losses(
    model: PreTrainedModel, ids: list[list[int]], labels: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sums and supervised-token counts [S] of a batch of S sequences."""
    length = max(map(len, ids))
    ids_ST = torch.zeros(len(ids), length, dtype=torch.long)
    mask_ST = torch.zeros(len(ids), length, dtype=torch.long)
    labels_ST = torch.full((len(ids), length), IGNORE)
    for row, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
        ids_ST[row, : len(row_ids)] = torch.tensor(row_ids)
        mask_ST[row, : len(row_ids)] = 1
        labels_ST[row, : len(row_ids)] = torch.tensor(row_labels)
    hidden_STD = _hidden_states(model, ids_ST, mask_ST)
    targets_ST = labels_ST[:, 1:]  # position t predicts token t + 1
    supervised_ST = targets_ST != IGNORE
    sequence_N = supervised_ST.nonzero()[:, 0]
    hidden_ND = hidden_STD[:, :-1][supervised_ST.to(hidden_STD.device)]
    targets_N = targets_ST[supervised_ST]
    losses_N = token_losses(model, hidden_ND, targets_N.to(hidden_ND.device))
    sums = torch.zeros(len(ids), dtype=torch.float64)
    sums.index_add_(0, sequence_N, losses_N.double().cpu())
    return sums, supervised_ST.sum(1)


def _hidden_states(
    model: PreTrainedModel, ids_ST: torch.Tensor, mask_ST: torch.Tensor
) -> torch.Tensor:
    device = model.device
    backbone: Any = model.base_model
    return backbone(
        input_ids=ids_ST.to(device), attention_mask=mask_ST.to(device), use_cache=False
    ).last_hidden_state


@contextlib.contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
