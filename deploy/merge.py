"""Adapter + base model -> one Transformers directory: files merged one tensor at a time, then read back.

What was saved is compared with base + adapter on a few sequences. The adapter of a trial over a 4-bit base
learned to correct that base: it is merged onto whichever of the full-precision base and the dequantised one
has the lower validation loss with it, and the full-precision base is scored for promotion to compare the
merged model with.
"""

import functools
import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from deploy.four_bit import DEQUANTISED, FULL_PRECISION, choose_base, dequantized, load_quantized
from deploy.shards import plan_merge, write_model
from training.config import TrialConfig
from training.evaluate import example_losses
from training.exceptions import GateError, ModelError
from training.model import load_model, resolve_model

NUM_SEQUENCES = 4
SEQUENCE_TOKENS = 256
MAX_LOGIT_DIFFERENCE = 0.02
MAX_KL = 1e-4
"""Nats a token; fp32 sums in another order stay several times below both."""


@dataclass(frozen=True)
class Merge:
    """What was measured while merging."""

    record: dict[str, Any]
    """Differences between base + adapter and the saved model, and what they may be at most; the base that
    the adapter was merged onto and, of a trial over a 4-bit one, the losses that chose it."""
    base: pd.DataFrame | None
    """Per-example losses of the full-precision base, of a trial over a 4-bit one."""
    dequantised_base: pd.DataFrame | None
    """Those of the dequantised base, if the adapter was merged onto that one."""


def merge_adapter(
    config: TrialConfig,
    adapter: Path,
    target: Path,
    sequences: Sequence[Sequence[int]],
    test: Dataset,
    device: torch.device,
    validation: Dataset | None = None,
) -> Merge:
    """Writes the merged model in float32, tokenizer, chat template and generation config into `target`.

    Args:
        config: the trial's settings.
        adapter: its PEFT adapter.
        target: directory to write.
        sequences: token ids on which base + adapter and the saved model are compared.
        test: examples on which the base is scored if the trial trained over a 4-bit one.
        device: where float32 has room (`deploy.memory.full_precision_device`).
        validation: examples that choose the base, of a trial over a 4-bit one; without them it is the
            full-precision one.

    Raises:
        ModelError: the adapter does not fit the base model; nothing is written then.
        GateError: the saved model is not base + adapter.
    """
    plan = plan_merge(config, adapter)
    batch_size = config.per_device_eval_batch_size
    quantized = load_quantized(config) if config.load_in_4bit and validation is not None else {}
    base = _load_full_precision(config, device)
    base_losses = example_losses(base, test, batch_size) if config.load_in_4bit else None
    model = _put_on(base, config, adapter)
    sequences = [list(sequence)[:SEQUENCE_TOKENS] for sequence in sequences[:NUM_SEQUENCES]]
    expected = [_log_probabilities(model, sequence) for sequence in sequences]
    loss_by_base, dequantised_losses = {}, None
    if validation is not None and quantized:
        loss_by_base = choose_base(base, quantized, validation, batch_size)
        if loss_by_base[DEQUANTISED] < loss_by_base[FULL_PRECISION]:
            expected = [_log_probabilities(model, sequence) for sequence in sequences]
            with model.disable_adapter():
                dequantised_losses = example_losses(base, test, batch_size)
        else:
            quantized = {}
    del base, model
    bases = {name: functools.partial(dequantized, weight) for name, weight in quantized.items()}
    write_model(plan, target, bases)
    saved = load_merged(target, device, config.trust_remote_code)
    record = _compare(saved, sequences, expected)
    record["device"] = device.type
    if not config.load_in_4bit:
        record["base"] = "as trained"
    else:
        record["base"] = DEQUANTISED if quantized else "full precision, trained over 4-bit"
        record["loss_by_base"] = loss_by_base
    if not (
        record["max_abs_difference"] <= MAX_LOGIT_DIFFERENCE and record["kl_divergence"] <= MAX_KL
    ):
        raise GateError(
            f"{target}: the merged model is not base + adapter: log-probabilities differ by up to "
            f"{record['max_abs_difference']:.3g} (at most {MAX_LOGIT_DIFFERENCE}), "
            f"KL {record['kl_divergence']:.3g} (at most {MAX_KL})"
        )
    return Merge(record, base_losses, dequantised_losses)


def load_with_adapter(config: TrialConfig, adapter: Path) -> PeftModel:
    """The base model as the trial had it, with the adapter on it, in evaluation mode."""
    return _put_on(load_model(config), config, adapter)


def full_precision_losses(
    config: TrialConfig, examples: Dataset, device: torch.device
) -> pd.DataFrame:
    """Per-example losses of the base model in fp32, whatever it was trained in."""
    base = _load_full_precision(config, device)
    return example_losses(base, examples, config.per_device_eval_batch_size)


def load_merged(
    directory: Path, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A merged model as it was saved, in fp32 and evaluation mode."""
    gc.collect()  # models used before are in reference cycles, and this one needs their room
    return AutoModelForCausalLM.from_pretrained(
        directory,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
        device_map={"": device},
        use_safetensors=True,
    ).eval()


def _load_full_precision(config: TrialConfig, device: torch.device) -> PreTrainedModel:
    """The base model in fp32, whatever the trial loaded it as."""
    source = resolve_model(config)
    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.float32,
            device_map={"": device},
            use_safetensors=True,
        ).eval()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"model_name_or_path is {config.model_name_or_path}: {cause}") from error


def _put_on(base: PreTrainedModel, config: TrialConfig, adapter: Path) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads a property that Transformers 5.23 has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base, str(adapter), torch_device=str(base.device))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{adapter} is not an adapter for {config.model_name_or_path}: {cause}"
        ) from error
    return model.eval()


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
    ids = torch.tensor([sequence], device=model.device)
    return model(input_ids=ids).logits[0].float().log_softmax(dim=-1).cpu()
