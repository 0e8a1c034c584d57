"""What promotion needs, checked before it starts: llama.cpp's runtime and converter, room on the disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deploy.gguf_model import load_llama_cpp
from deploy.llama_cpp_source import converter_dir
from deploy.quantize import UNQUANTIZED, Quantization
from training.config import TrialConfig
from training.exceptions import SweepError
from training.model import resolve_model

MERGED_BYTES = 4.0
F16_BYTES = 2.0
FALLBACK_FACTOR = 1.4
"""Matrices whose rows do not divide by 256 are stored in larger types: 6.2 bits for Q4_K_M's 4.9."""
OTHER_BYTES = 100_000_000
"""Tokenizer, adapter, card, and room to spare."""


def check_ready(
    config: TrialConfig, quantizations: Sequence[Quantization], directory: Path
) -> None:
    """Raises for the first thing that is missing.

    Raises:
        ModelError: llama_cpp or the converter is not there.
        SweepError: too little room in `directory`.
    """
    load_llama_cpp()
    converter_dir()
    needed = estimate_bytes(count_parameters(config), quantizations)
    existing = next(path for path in (directory, *directory.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SweepError(
            f"{directory}: free space is {free / 1e9:.1f} GB, but must be at least "
            f"{needed / 1e9:.1f} GB for the merged model and its GGUFs"
        )


def estimate_bytes(num_params: int, quantizations: Sequence[Quantization]) -> int:
    """Room that a promotion takes while it runs."""
    quantized = sum(
        item.bits_per_weight / 8 * FALLBACK_FACTOR
        for item in quantizations
        if item.name != UNQUANTIZED
    )
    return round(num_params * (MERGED_BYTES + F16_BYTES + quantized)) + OTHER_BYTES


def count_parameters(config: TrialConfig) -> int:
    """Parameters of the base model, from its configuration alone."""
    architecture = AutoConfig.from_pretrained(
        resolve_model(config),
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture, trust_remote_code=config.trust_remote_code
        )
    return model.num_parameters()
