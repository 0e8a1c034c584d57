"""What promotion needs, checked before it starts: llama.cpp's runtime and converter, memory, room on disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from deploy.export_gguf import check_architecture
from deploy.gguf_model import load_llama_cpp
from deploy.gguf_types import UNQUANTIZED, Quantization
from deploy.llama_cpp_source import converter_dir
from deploy.memory import FP32_BYTES, check_memory, count_parameters
from training.config import TrialConfig
from training.exceptions import SweepError
from training.paths import SweepPaths

F16_BYTES = 2.0
FALLBACK_FACTOR = 1.4
"""Matrices whose rows do not divide by 256 are stored in larger types: 6.2 bits for Q4_K_M's 4.9."""
OTHER_BYTES = 100_000_000
"""Tokenizer, adapter, card, and room to spare."""


def check_ready(
    config: TrialConfig, quantizations: Sequence[Quantization], paths: SweepPaths
) -> None:
    """Raises for the first thing that is missing.

    Raises:
        ModelError: llama_cpp or the converter is not there, or the model is not or is too large.
        SweepError: too little room for another version in the sweep's directory.
    """
    load_llama_cpp()
    converter_dir()
    check_architecture(config)
    num_params = count_parameters(config)
    check_memory(config, num_params)
    needed = estimate_bytes(num_params, quantizations)
    promoted = paths.promoted
    existing = next(path for path in (promoted, *promoted.parents) if path.is_dir())
    # What a killed promotion left behind is removed when the next one starts.
    free = shutil.disk_usage(existing).free + _size_bytes(paths.promotion_draft)
    if free < needed:
        raise SweepError(
            f"{promoted}: free space is {free / 1e9:.1f} GB, but must be at least "
            f"{needed / 1e9:.1f} GB for the merged model and its GGUFs"
        )


def estimate_bytes(num_params: int, quantizations: Sequence[Quantization]) -> int:
    """Room that a promotion takes while it runs."""
    quantized = sum(
        item.bits_per_weight / 8 * FALLBACK_FACTOR
        for item in quantizations
        if item.name != UNQUANTIZED
    )
    # Of a type that gains from an importance matrix there are two files, until one is chosen.
    tried = max(
        (
            item.bits_per_weight / 8 * FALLBACK_FACTOR
            for item in quantizations
            if item.gains_from_imatrix
        ),
        default=0.0,
    )
    return round(num_params * (FP32_BYTES + F16_BYTES + quantized + tried)) + OTHER_BYTES


def _size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
