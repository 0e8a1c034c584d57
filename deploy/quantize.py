"""An f16 GGUF -> a smaller one, by llama.cpp's own quantiser.

The table of types says what promotion allows each to lose. The file appears whole or not at all, since
llama.cpp writes in place.
"""

import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.gguf_model import last_error, load_llama_cpp, open_gguf
from deploy.llama_cpp_wheel import num_cores
from training.evaluate import mean_loss
from training.exceptions import ConfigError, ModelError, nearest
from training.paths import write_atomic

UNQUANTIZED = "F16"


@dataclass(frozen=True)
class Quantization:
    """A GGUF type by llama.cpp's name."""

    name: str
    ftype: str
    """Name of the constant in `llama_cpp`, after `LLAMA_FTYPE_MOSTLY_`."""
    bits_per_weight: float
    """Nominal; tensors whose rows do not divide by 256 take more."""
    tolerance: float
    """Most that mean test loss (nats a token) may differ from the merged model's.

    About three times what was measured on SmolLM2-135M, whose small matrices quantise badly.
    """
    gains_from_imatrix: bool = True


QUANTIZATIONS = {
    item.name: item
    for item in (
        Quantization("Q4_K_M", "Q4_K_M", 4.9, 0.25),
        Quantization("Q5_K_M", "Q5_K_M", 5.7, 0.25),
        Quantization("Q6_K", "Q6_K", 6.6, 0.05),
        Quantization("Q8_0", "Q8_0", 8.5, 0.02, gains_from_imatrix=False),
        Quantization("IQ4_XS", "IQ4_XS", 4.3, 0.4),
        Quantization(UNQUANTIZED, "F16", 16.0, 0.01, gains_from_imatrix=False),
        # From the f16 file, whose rounding is an eighth of what bf16's shorter mantissa does.
        Quantization("BF16", "BF16", 16.0, 0.01, gains_from_imatrix=False),
    )
}
DEFAULT_QUANTIZATION = "Q4_K_M"
ALL = "all"
"""In the place of names: every type."""


def check_quantizations(names: Iterable[str]) -> list[Quantization]:
    """The types of these names, each once; `all` is every type, those named beside it first.

    Raises:
        ConfigError: a name is unknown, or there is none.
    """
    names = list(dict.fromkeys(names))
    if ALL in names:
        names = list(dict.fromkeys([name for name in names if name != ALL] + [*QUANTIZATIONS]))
    if not names:
        raise ConfigError(f"--quantization is empty, but must name at least one of {_known()}")
    for name in names:
        if name not in QUANTIZATIONS:
            hint = nearest(name.upper(), QUANTIZATIONS)
            raise ConfigError(f"--quantization is {name}, but must be one of {_known()}{hint}")
    return [QUANTIZATIONS[name] for name in names]


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


def _known() -> str:
    return f"{', '.join(QUANTIZATIONS)}, {ALL}"
