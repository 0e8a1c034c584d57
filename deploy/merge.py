"""Adapter + base model -> one Transformers directory: PEFT's merge in fp32, saved and read back.

What was saved is compared with base + adapter on a few sequences. A trial that trained over a 4-bit base
is merged onto the full-precision one: its adapter learned to correct a slightly different base, which
the losses of promotion's verification show.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from training.config import TrialConfig
from training.exceptions import GateError, ModelError
from training.model import find_device, load_model, load_tokenizer

NUM_SEQUENCES = 4
SEQUENCE_TOKENS = 256
MAX_LOGIT_DIFFERENCE = 0.02
MAX_KL = 1e-4
"""Nats a token; fp32 sums in another order stay several times below both."""


def merge_adapter(
    config: TrialConfig, adapter: Path, target: Path, sequences: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Writes the merged model, tokenizer, chat template and generation config into `target`.

    Args:
        config: the trial's settings.
        adapter: its PEFT adapter.
        target: directory to write.
        sequences: token ids on which base + adapter and the saved model are compared.

    Returns:
        The measured differences and what they may be at most.

    Raises:
        ModelError: the adapter does not fit the base model.
        GateError: the saved model is not base + adapter.
    """
    full = dataclasses.replace(config, dtype="float32", load_in_4bit=False)
    model = load_with_adapter(full, adapter)
    sequences = [list(sequence)[:SEQUENCE_TOKENS] for sequence in sequences[:NUM_SEQUENCES]]
    expected = [_log_probabilities(model, sequence) for sequence in sequences]
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(target, safe_serialization=True)
    load_tokenizer(config).save_pretrained(target)
    del model, merged
    saved = load_merged(target)
    record = _compare(saved, sequences, expected)
    record["base"] = "full precision, trained over 4-bit" if config.load_in_4bit else "as trained"
    if not (
        record["max_abs_difference"] <= MAX_LOGIT_DIFFERENCE and record["kl_divergence"] <= MAX_KL
    ):
        raise GateError(
            f"{target}: the merged model is not base + adapter: log-probabilities differ by up to "
            f"{record['max_abs_difference']:.3g} (at most {MAX_LOGIT_DIFFERENCE}), "
            f"KL {record['kl_divergence']:.3g} (at most {MAX_KL})"
        )
    return record


def load_with_adapter(config: TrialConfig, adapter: Path) -> PeftModel:
    """The base model with the adapter on it, in evaluation mode."""
    base = load_model(config)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads a property that Transformers 5.23 has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{adapter} is not an adapter for {config.model_name_or_path}: {cause}"
        ) from error
    return model.eval()


def load_merged(directory: Path) -> PreTrainedModel:
    """A merged model as it was saved, in fp32 and evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map={"": find_device()}, use_safetensors=True
    ).eval()


def _compare(
    model: PreTrainedModel, sequences: Sequence[list[int]], expected: Sequence[torch.Tensor]
) -> dict[str, Any]:
    largest, divergence, num_tokens = 0.0, 0.0, 0
    for sequence, expected_TV in zip(sequences, expected, strict=True):
        found_TV = _log_probabilities(model, sequence)
        largest = max(largest, (found_TV - expected_TV).abs().max().item())
        divergence += (expected_TV.exp() * (expected_TV - found_TV)).sum().item()
        num_tokens += len(sequence)
    return {
        "num_sequences": len(sequences),
        "num_tokens": num_tokens,
        "max_abs_difference": largest,
        "max_abs_difference_allowed": MAX_LOGIT_DIFFERENCE,
        "kl_divergence": max(divergence / max(num_tokens, 1), 0.0),
        "kl_divergence_allowed": MAX_KL,
    }


@torch.inference_mode()
def _log_probabilities(model: Any, sequence: list[int]) -> torch.Tensor:
    ids = torch.tensor([sequence], device=find_device())
    return model(input_ids=ids).logits[0].float().log_softmax(dim=-1).cpu()
