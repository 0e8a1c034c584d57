"""An f16 GGUF -> a smaller one, by llama.cpp's own quantiser.

The table of types says what promotion allows each to lose. The file appears whole or not at all, since
llama.cpp writes in place.
"""

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deploy.gguf_model import last_error, load_llama_cpp
from deploy.llama_cpp_wheel import num_cores
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


QUANTIZATIONS = {
    item.name: item
    for item in (
        Quantization("Q4_K_M", "Q4_K_M", 4.9, 0.25),
        Quantization("Q5_K_M", "Q5_K_M", 5.7, 0.25),
        Quantization("Q6_K", "Q6_K", 6.6, 0.05),
        Quantization("Q8_0", "Q8_0", 8.5, 0.02),
        Quantization("IQ4_XS", "IQ4_XS", 4.3, 0.4),
        Quantization(UNQUANTIZED, "F16", 16.0, 0.01),
    )
}
DEFAULT_QUANTIZATION = "Q4_K_M"


def check_quantizations(names: Iterable[str]) -> list[Quantization]:
    """The types of these names, each once.

    Raises:
        ConfigError: a name is unknown, or there is none.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise ConfigError(f"--quantization is empty, but must name at least one of {_known()}")
    for name in names:
        if name not in QUANTIZATIONS:
            hint = nearest(name.upper(), QUANTIZATIONS)
            raise ConfigError(f"--quantization is {name}, but must be one of {_known()}{hint}")
    return [QUANTIZATIONS[name] for name in names]


def quantize(source: Path, outfile: Path, quantization: Quantization) -> None:
    """Writes the f16 GGUF `source` to `outfile` in a smaller type.

    Raises:
        ModelError: llama.cpp's quantiser failed.
    """
    llama_cpp = load_llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.ftype}")
    params.nthread = num_cores()

    def write(path: Path) -> None:
        status = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(path), ctypes.byref(params)
        )
        if status or not path.is_file():
            raise ModelError(
                f"{source}: llama.cpp cannot quantise it to {quantization.name}{last_error()}"
            )

    write_atomic(outfile, write)


def _known() -> str:
    return ", ".join(QUANTIZATIONS)
