"""How large a model is, and where its full-precision form is merged and scored.

A GPU that trained over a 4-bit or bfloat16 base may not hold the same model in float32: then merging and
scoring go to the CPU, whose memory is checked before anything starts.
"""

import gc

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from training.config import TrialConfig
from training.exceptions import ModelError
from training.model import find_device, resolve_model

FP32_BYTES = 4.0
FOUR_BIT_BYTES = 0.6
"""A weight in NF4 with its share of a block's scale; kept beside float32 until a base is chosen."""
OTHER_BYTES = 1_000_000_000
"""Activations, logits and the adapter, beside the weights."""


def count_parameters(config: TrialConfig) -> int:
    """Parameters of the base model, from its configuration alone.

    Raises:
        ModelError: its configuration cannot be had, or is of no causal language model.
    """
    return load_skeleton(config).num_parameters()


def load_skeleton(config: TrialConfig) -> PreTrainedModel:
    """The base model without weights (on PyTorch's meta device)."""
    source = resolve_model(config)
    try:
        architecture = AutoConfig.from_pretrained(
            source, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, ImportError) as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"model_name_or_path is {config.model_name_or_path}: {cause}") from error


def full_precision_device(num_params: int, load_in_4bit: bool = False) -> torch.device:
    """The GPU if a float32 model of that size fits in what is free of it now, else the CPU.

    Args:
        num_params: of the model.
        load_in_4bit: the 4-bit model has to fit beside it.
    """
    device = find_device()
    if device.type != "cuda":
        return device
    gc.collect()  # a model that was just used is in reference cycles
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return device if full_precision_bytes(num_params, load_in_4bit) <= free else torch.device("cpu")


def full_precision_bytes(num_params: int, load_in_4bit: bool = False) -> float:
    """Memory that a float32 model of that size is used in, the 4-bit one beside it or not."""
    return (FP32_BYTES + FOUR_BIT_BYTES * load_in_4bit) * num_params + OTHER_BYTES


def check_memory(config: TrialConfig, num_params: int) -> None:
    """Raises ModelError where the float32 model fits neither the GPU nor the memory that is free."""
    is_4bit = config.load_in_4bit
    if full_precision_device(num_params, is_4bit).type != "cpu":
        return
    needed, free = full_precision_bytes(num_params, is_4bit), psutil.virtual_memory().available
    if free < needed:
        raise ModelError(
            f"model_name_or_path is {config.model_name_or_path}: free memory is {free / 1e9:.1f} GB, "
            f"but must be at least {needed / 1e9:.1f} GB to merge the model in float32"
        )
