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
from torch.nn import functional
from transformers import PreTrainedModel

from training.chat import IGNORE
from training.exceptions import ModelError

MAX_LOGITS = 2**25
"""Most logits at a time: 128 MiB in float32."""


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
        _check_head(model, ids[order[0]][:8] if order else [])
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


def output_logits(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] in float32 from the backbone's last hidden states, as the model's own forward."""
    head: Any = model.get_output_embeddings()
    config: Any = model.config.get_text_config()
    logits_NV = head(hidden_ND).float() * _logit_scale(config)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap


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
    sums = torch.zeros(len(ids), dtype=torch.float64)
    chunk = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    for start in range(0, len(targets_N), chunk):
        part = slice(start, start + chunk)
        logits_NV = output_logits(model, hidden_ND[part])
        losses_N = functional.cross_entropy(
            logits_NV, targets_N[part].to(logits_NV.device), reduction="none"
        )
        sums.index_add_(0, sequence_N[part], losses_N.double().cpu())
    return sums, supervised_ST.sum(1)


def _hidden_states(
    model: PreTrainedModel, ids_ST: torch.Tensor, mask_ST: torch.Tensor
) -> torch.Tensor:
    device = model.device
    backbone: Any = model.base_model
    return backbone(
        input_ids=ids_ST.to(device), attention_mask=mask_ST.to(device), use_cache=False
    ).last_hidden_state


def _logit_scale(config: Any) -> float:
    """Factor between the head's output and the logits; 1 for most architectures."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides by it
        return 1 / float(config.logits_scaling)
    return 1.0


def _check_head(model: PreTrainedModel, ids: list[int]) -> None:
    """Compares `output_logits` with the model's own forward on a few tokens.

    Architectures treat the head's output in ways of their own; a loss computed otherwise would look
    plausible and be wrong.
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


@contextlib.contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
