"""What each layer's inputs are on the training data, so that quantisation spares the weights that matter.

`importance(model, examples)` sums, over tokens, the squares of every linear layer's inputs (llama.cpp's
`imatrix`: tools/imatrix/README.md there); `for_gguf` gives them the file's tensor names. The quantiser weighs
each column's rounding error with them; whether that helps this model is measured (`deploy.quantize`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from training.exceptions import ModelError

CHUNK = 512
"""Tokens of a sequence, as in llama.cpp's own tool."""
NUM_TOKENS = 8192
"""Of the training data: enough for stable means, a quarter of a minute for the demo model on two cores."""

Importance = dict[str, np.ndarray]
"""Tensor -> mean squared input of each of its columns."""


@torch.no_grad()
def importance(
    model: Any, examples: Sequence[Mapping[str, Any]], num_tokens: int = NUM_TOKENS
) -> Importance:
    """Mean squares of the inputs of every linear layer, by the layer's name in the model.

    Args:
        model: a Transformers causal model.
        examples: with `input_ids`; as many as make `num_tokens`.
        num_tokens: most tokens to look at.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(_: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                rows = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
                square = rows.square().sum(0)
                sums[name] = sums[name] + square if name in sums else square
                counts[name] = counts.get(name, 0) + len(rows)

            hooks.append(module.register_forward_pre_hook(add))
    # One example after the other in one text: the first token of a sequence has activations so large (an
    # "attention sink") that those of many short sequences would drown all others.
    ids: list[int] = []
    for example in examples:
        ids.extend(example["input_ids"])
        if len(ids) >= num_tokens:
            break
    try:
        for start in range(0, min(len(ids), num_tokens), CHUNK):
            chunk = torch.tensor([ids[start : start + CHUNK]], device=model.device)
            # Logits of the last token alone: the head's own input is no matter here.
            model(input_ids=chunk, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).cpu().numpy() for name, total in sums.items()}


def for_gguf(found: Importance, path: Path) -> Importance:
    """The same by the names of the tensors in a GGUF; layers that it has not are left out.

    Raises:
        ModelError: no layer is in it, so that nothing would be weighed.
    """
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    blocks = int(reader.fields[f"{architecture}.block_count"].contents())
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in architectures:
        raise ModelError(f"{path}: architecture {architecture} has no importance matrix here")
    names = gguf.get_tensor_name_map(architectures[architecture], blocks)
    columns = {tensor.name: int(tensor.shape[0]) for tensor in reader.tensors}
    result = {}
    for layer, squares in found.items():
        tensor = f"{names.get_name(layer) or layer}.weight"
        if columns.get(tensor) == len(squares):
            result[tensor] = squares.astype(np.float32)
    if not result:
        raise ModelError(f"{path}: none of its tensors is a layer of the merged model")
    return result
