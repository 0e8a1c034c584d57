"""What a PEFT LoRA adapter adds to each weight of its base, read from its directory alone.

PEFT's own semantics: alpha/r or rsLoRA's scaling, alpha by pattern, embeddings, `fan_in_fan_out`. Anything
that is more than LoRA's two matrices a layer (DoRA, biases, saved modules) is refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from training.exceptions import ModelError
from training.paths import read_json

LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
COPY_KEY = re.compile(r"base_model\.model\.(?!.*\.lora_).+\.weight")
"""PEFT saves the base's embeddings, unchanged, beside the adapter of an embedding or head."""
BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's weights as they are."""


@dataclass(frozen=True)
class Delta:
    """What the adapter adds to one weight."""

    A_RD: torch.Tensor
    B_DR: torch.Tensor
    scaling: float
    is_transposed: bool
    """Of an embedding, or of a layer that keeps its weight as inputs x outputs (`fan_in_fan_out`)."""

    @property
    def shape(self) -> list[int]:
        shape = [self.B_DR.shape[0], self.A_RD.shape[1]]
        return shape[::-1] if self.is_transposed else shape

    def weight(self) -> torch.Tensor:
        product = self.B_DR @ self.A_RD
        return (product.T if self.is_transposed else product) * self.scaling


def read_adapter(adapter: Path, misfit: str) -> dict[str, Delta]:
    """What a PEFT adapter adds, by the module's name, in float32.

    Args:
        adapter: its directory.
        misfit: how an error begins.

    Raises:
        ModelError: it is no adapter, or has more than LoRA's two matrices a layer.
    """
    try:
        settings = read_json(adapter / "adapter_config.json")
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{misfit}: {cause}") from error
    start = settings.get("init_lora_weights", True)
    if start not in BASE_UNCHANGED or settings.get("alora_invocation_tokens"):
        raise ModelError(f"{misfit}: it needs a base that is changed for it ({start})")
    parts: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = LORA_KEY.fullmatch(key)
        if COPY_KEY.fullmatch(key) and not settings.get("modules_to_save"):
            continue
        if not match:
            raise ModelError(f"{misfit}: {key} is neither lora_A nor lora_B of a layer")
        module, embedding, letter = match.groups()
        parts.setdefault((module, bool(embedding)), {})[letter] = tensor.float()
    deltas = {}
    for (module, is_embedding), matrices in parts.items():
        if len(matrices) < 2 or matrices["A"].shape[0] != matrices["B"].shape[1]:
            raise ModelError(f"{misfit}: lora_A and lora_B of {module} do not go together")
        rank = matrices["A"].shape[0]
        alpha = _of_pattern(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        is_transposed = is_embedding or bool(settings.get("fan_in_fan_out"))
        deltas[module] = Delta(matrices["A"], matrices["B"], scaling, is_transposed)
    return deltas


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
