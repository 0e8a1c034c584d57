"""The GGUF types that promotion makes, and what each may lose."""

from collections.abc import Iterable
from dataclasses import dataclass

from training.exceptions import ConfigError, nearest

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


def _known() -> str:
    return f"{', '.join(QUANTIZATIONS)}, {ALL}"
