"""How large a model is, and where its full-precision form is merged and scored.

A GPU that trained over a 4-bit or bfloat16 base may not hold the same model in float32: then merging and
scoring go to the CPU, whose memory is checked before anything starts.
"""

import gc

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training.config import TrialConfig
from training.exceptions import ModelError
from training.model import find_device, resolve_model

FP32_BYTES = 4.0
OTHER_BYTES = 1_000_000_000
"""Activations, logits and the adapter, beside the weights."""


def count_parameters(config: TrialConfig) -> int:
    """Parameters of the base model, from its configuration alone.

    Raises:
        ModelError: its configuration cannot be had, or is of no causal language model.
    """
    source = resolve_model(config)
    try:
        architecture = AutoConfig.from_pretrained(
            source, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, ImportError) as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"model_name_or_path is {config.model_name_or_path}: {cause}") from error
    return model.num_parameters()


def full_precision_device(num_params: int) -> torch.device:
    """The GPU if a float32 model of that size fits in what is free of it now, else the CPU."""
    device = find_device()
    if device.type != "cuda":
        return device
    gc.collect()  # a model that was just used is in reference cycles
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return device if full_precision_bytes(num_params) <= free else torch.device("cpu")


def full_precision_bytes(num_params: int) -> float:
    """Memory that a float32 model of that size is used in."""
    return FP32_BYTES * num_params + OTHER_BYTES


def check_memory(config: TrialConfig, num_params: int) -> None:
    """Raises ModelError where the float32 model fits neither the GPU nor the memory that is free."""
    if full_precision_device(num_params).type != "cpu":
        return
    needed, free = full_precision_bytes(num_params), psutil.virtual_memory().available
    if free < needed:
        raise ModelError(
            f"model_name_or_path is {config.model_name_or_path}: free memory is {free / 1e9:.1f} GB, "
            f"but must be at least {needed / 1e9:.1f} GB to merge the model in float32"
        )
