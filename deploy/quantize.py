"""An f16 GGUF -> a smaller one, by llama.cpp's own quantiser.

The file appears whole or not at all, since llama.cpp writes in place.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.gguf_model import last_error, load_llama_cpp, open_gguf
from deploy.gguf_types import Quantization
from deploy.llama_cpp_wheel import num_cores
from training.evaluate import mean_loss
from training.exceptions import ModelError
from training.paths import write_atomic


def quantize(
    source: Path,
    outfile: Path,
    quantization: Quantization,
    importance: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes the f16 GGUF `source` to `outfile` in a smaller type.

    Args:
        source: the f16 GGUF.
        outfile: where the smaller one goes.
        quantization: its type.
        importance: `deploy.imatrix.for_gguf`'s, for the types that gain from it.

    Raises:
        ModelError: llama.cpp's quantiser failed.
    """
    llama_cpp = load_llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.ftype}")
    params.nthread = num_cores()
    if importance and quantization.gains_from_imatrix:
        _kept, params.imatrix = _imatrix(llama_cpp, importance)

    def write(path: Path) -> None:
        status = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(path), ctypes.byref(params)
        )
        if status or not path.is_file():
            raise ModelError(
                f"{source}: llama.cpp cannot quantise it to {quantization.name}{last_error()}"
            )

    write_atomic(outfile, write)


def quantize_best(
    source: Path,
    outfile: Path,
    quantization: Quantization,
    importance: Mapping[str, np.ndarray] | None,
    examples: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Quantises with the importance matrix and without, and keeps what scores better.

    Better nearly always is with. But a base whose weights were quantised before (as the demo model's were)
    lies on a grid that the weighed search finds again, and what the adapter has added to it is rounded away.

    Args:
        source: the f16 GGUF.
        outfile: where the smaller one goes.
        quantization: its type.
        importance: for the types that gain from it; without one there is nothing to choose.
        examples: validation examples, `input_ids` and `labels`.

    Returns:
        `used`, and the losses of both, nats a token.
    """
    if not importance or not quantization.gains_from_imatrix:
        quantize(source, outfile, quantization)
        return {"used": False}
    plain = outfile.with_name(f".{outfile.name}.plain")
    try:
        quantize(source, plain, quantization)
        quantize(source, outfile, quantization, importance)
        losses = {"with": _loss(outfile, examples), "without": _loss(plain, examples)}
        used = losses["with"] <= losses["without"]
        if not used:
            os.replace(plain, outfile)
    finally:
        plain.unlink(missing_ok=True)
    return {"used": used, "validation_loss": losses}


def _loss(path: Path, examples: Sequence[Mapping[str, Any]]) -> float:
    longest = max(len(example["input_ids"]) for example in examples)
    with open_gguf(path, num_ctx=longest + 8) as model:
        return mean_loss(model.example_losses(examples))


def _imatrix(llama_cpp: Any, importance: Mapping[str, np.ndarray]) -> tuple[list[Any], Any]:
    """llama.cpp's array of tensors, ended by one without a name; and what must live as long as it."""
    items = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    kept: list[Any] = [items]
    for item, (name, squares) in zip(items, importance.items(), strict=False):
        data = np.ascontiguousarray(squares, np.float32)
        kept.append(data)
        item.name = name.encode()
        item.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        item.size = data.size
    return kept, ctypes.cast(items, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
