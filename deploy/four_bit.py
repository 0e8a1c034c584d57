"""The weights that a trial over a 4-bit base was trained on: rounded to 4 bits, in float32 again.

An adapter learns to correct the rounding, too. Whether it serves the full-precision base or the rounded one
better is measured on validation examples (`choose_base`), with base and adapter in one model.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from datasets import Dataset

from training.config import TrialConfig
from training.evaluate import example_losses, mean_loss
from training.model import load_model

FULL_PRECISION, DEQUANTISED = "full precision", "dequantised 4-bit"


def load_quantized(config: TrialConfig) -> dict[str, Params4bit]:
    """Weights of the layers that the trial had in 4 bits, by the layer's name."""
    return {
        name: cast(Params4bit, module.weight)
        for name, module in load_model(config).named_modules()
        if isinstance(module, Linear4bit)
    }


def dequantized(weight: Params4bit) -> torch.Tensor:
    """In float32, as the products of training had it."""
    return dequantize_4bit(weight.data, weight.quant_state).float()


def choose_base(
    model: Any, quantized: Mapping[str, Params4bit], validation: Dataset, batch_size: int
) -> dict[str, float]:
    """Mean validation losses of base + adapter, nats a token; `model` is left with the dequantised base.

    Args:
        model: the full-precision base with LoRA layers in it.
        quantized: from `load_quantized`.
        validation: examples.
        batch_size: sequences at a time.
    """
    losses = {FULL_PRECISION: mean_loss(example_losses(model, validation, batch_size))}
    with torch.no_grad():
        for name, weight in quantized.items():
            model.get_submodule(name).weight.copy_(dequantized(weight))
    losses[DEQUANTISED] = mean_loss(example_losses(model, validation, batch_size))
    return losses
