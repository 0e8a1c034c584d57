"""Ways of attending on this machine: the explicit products beside torch's own attention, by length.

    python -m benchmarks.attention

Milliseconds of one forward and backward pass over a row of about 1,000 tokens with the demo model's heads
(9 query heads, 3 key heads of 64). `training.attention.SHORT` is where the second becomes the faster one.
"""

import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from training import attention
from training.row import Part, build_row, current

RESULTS = Path(__file__).with_name("results")
LENGTHS = (32, 64, 128, 256, 512, 1024)
ROUNDS = 9


def main() -> None:
    torch.manual_seed(0)
    attention.SHORT = max(LENGTHS)
    results = {}
    print("| tokens a sequence | explicit, ms | torch's own, ms |\n| ---: | ---: | ---: |")
    for length in LENGTHS:
        times: dict[str, list[float]] = {"explicit": [], "generic": []}
        for _ in range(ROUNDS):
            for way, measured in times.items():
                attention.disabled = set() if way == "explicit" else set(attention.FAST_PATHS)
                measured.append(one_pass(length))
        results[length] = {way: round(statistics.median(ts) * 1e3, 2) for way, ts in times.items()}
        explicit, generic = results[length]["explicit"], results[length]["generic"]
        print(f"| {length} | {explicit} | {generic} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "attention.json").write_text(json.dumps(results, indent=2) + "\n")


def one_pass(length: int) -> float:
    """Seconds of attending forward and backward."""
    tokens = np.arange(length)
    parts = [Part(adapter=None, sequences=[(tokens, tokens)]) for _ in range(1024 // length)]
    row = build_row(parts, torch.device("cpu"))
    query, key, value = (
        torch.randn(1, len(row), heads * 64).view(1, len(row), heads, 64).transpose(1, 2)
        for heads in (9, 3, 3)
    )
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    started = time.perf_counter()
    with current(row):
        output, _ = attention.packed_attention(
            torch.nn.Identity(), leaves[0], leaves[1], leaves[2], None
        )
    output.backward(torch.ones_like(output))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
