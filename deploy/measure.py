"""What each GGUF loses against the float32 merged model, how fast it is, and which one to take.

`make_reference` keeps the merged model's log-probabilities at some supervised positions of test examples;
`Distances` compares a GGUF's with them while verification scores it; `measure` joins losses, size and
speed; `recommend` chooses. N positions, S of a batch, V vocabulary.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from analysis.stats import Interval, corrected, difference_interval, loss_interval
from deploy.gguf_model import NOT_SUPERVISED, Speed, open_gguf
from training.exceptions import ConfigError, GateError

CONFIDENCE = 0.95
MARGIN = 0.01
"""Nats a token, 1 % of perplexity: a type whose interval ends below it is not measurably worse.

That the interval holds 0 would not do: of few examples it nearly always does, and of many it never does,
however little is lost.
"""
MAX_POSITIONS = 2048
MAX_REFERENCE_BYTES = 2**28
"""Positions that are compared: 2048 of a vocabulary of 49,152 (201 MB in float16), 883 of 152,000."""
ROWS = 16
"""Positions compared at a time."""
NUM_PROMPT_TOKENS, NUM_SPEED_TOKENS, SPEED_LIMIT_S = 128, 64, 4.0
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?)?B?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Limits:
    """What the user allows; None is no limit."""

    max_kl: float | None = None
    """Nats a token."""
    max_size_bytes: int | None = None


@dataclass(frozen=True)
class Reference:
    """The merged model at N positions."""

    log_probabilities_NV: np.ndarray
    """float16."""
    best_N: np.ndarray
    """The likeliest token."""
    rows: Mapping[str, tuple[int, np.ndarray]]
    """Example id -> its first position here, and which of its supervised tokens its positions predict."""


@dataclass(frozen=True)
class Measurement:
    """One GGUF. Losses and divergences in nats a token; intervals over examples."""

    quantization: str
    size_bytes: int
    bits_per_weight: float
    num_positions: int
    """Over which divergences are averaged."""
    kl: Interval
    """Kullback-Leibler divergence of the file from the merged model."""
    kl_99: float
    """99th percentile over positions."""
    top_1: float
    """Share of positions at which both hold the same token the likeliest."""
    loss: Interval
    difference: Interval
    """Of the file's loss minus the merged model's, paired; its confidence is `corrected` for the types."""
    speed: Speed | None = None

    @property
    def perplexity(self) -> Interval:
        ends = (self.loss.low, self.loss.high, self.loss.estimate)
        return Interval(*map(math.exp, ends))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an interval of too few examples has None for its ends."""
        return {
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "kl_divergence": _interval(self.kl),
            "kl_divergence_99th_percentile": self.kl_99,
            "top_1_agreement": self.top_1,
            "perplexity": _interval(self.perplexity),
            "loss_minus_merged": _interval(self.difference),
            "tokens_per_s": None if self.speed is None else dataclasses.asdict(self.speed),
        }


@dataclass(frozen=True)
class Recommendation:
    """The type to take, and why; without one, why none."""

    quantization: str | None
    reason: str

    def __str__(self) -> str:
        return f"recommended: {self.quantization or 'none'}: {self.reason}"


@dataclass(frozen=True)
class MeasuredTypes:
    """All of a promotion's types, as the card tells of them."""

    items: Sequence[Measurement]
    recommendation: Recommendation
    num_positions: int
    """Over which divergences are averaged."""
    picture: str | None = None
    """File name of `deploy.measure_figure`'s; None where there is none."""


def make_limits(max_kl: float | None, max_size: str) -> Limits:
    """Limits from `--max_kl` and `--max_size` (`100MB`, `1.5GiB`, bytes; empty is none).

    Raises:
        ConfigError: one of them is no such number.
    """
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
        raise ConfigError(f"--max_kl is {max_kl:g}, but must be > 0 (nats a token)")
    if not max_size:
        return Limits(max_kl)
    match = _SIZE.fullmatch(max_size.strip())
    size_bytes = round(float(match[1]) * _FACTORS[(match[2] or "").upper()]) if match else 0
    if size_bytes < 1:
        raise ConfigError(
            f"--max_size is {max_size!r}, but must be a size such as 100MB, 1.5GB, 700MiB or bytes"
        )
    return Limits(max_kl, size_bytes)


@torch.no_grad()
def make_reference(
    model: Any, examples: Sequence[Mapping[str, Any]], max_positions: int = MAX_POSITIONS
) -> Reference:
    """The merged model's log-probabilities where the next token is supervised.

    Of more than MAX_POSITIONS, or than MAX_REFERENCE_BYTES have room for, evenly spaced ones are kept.

    Args:
        model: Transformers causal model.
        examples: with `example_id`, `input_ids`, `labels`.
        max_positions: to keep at most.
    """
    num_vocab = model.config.get_text_config().vocab_size
    supervised = [np.flatnonzero(_targets(example) != NOT_SUPERVISED) for example in examples]
    total = sum(map(len, supervised))
    count = min(total, max_positions, max(1, MAX_REFERENCE_BYTES // (2 * num_vocab)))
    kept = np.unique(np.linspace(0, max(total - 1, 0), count).round().astype(int))
    log_probabilities_NV = np.empty((len(kept), num_vocab), np.float16)
    best_N = np.empty(len(kept), np.int64)
    rows, seen, start = {}, 0, 0
    for example, positions in zip(examples, supervised, strict=True):
        inside = kept[(kept >= seen) & (kept < seen + len(positions))] - seen
        seen += len(positions)
        rows[example["example_id"]] = (start, inside)
        if not len(inside):
            continue
        part = slice(start, start + len(inside))
        ids = torch.tensor([list(example["input_ids"])], device=model.device)
        wanted = torch.as_tensor(positions[inside], device=model.device)
        logits_nV = model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits[0].float()
        best_N[part] = logits_nV.argmax(1).cpu().numpy()
        log_probabilities_NV[part] = logits_nV.log_softmax(1).cpu().numpy()
        start = part.stop
    return Reference(log_probabilities_NV, best_N, rows)


class Distances:
    """A GGUF's probabilities against the reference's, position by position."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self.divergences_N = np.full(len(reference.best_N), np.nan)
        self._same_N = np.zeros(len(reference.best_N), bool)

    def look(self, example_id: str, first: int, logits_SV: np.ndarray) -> None:
        """`deploy.gguf_model.LookAtExample`: threads write at positions of their own examples."""
        start, inside = self._reference.rows[example_id]
        begin, end = np.searchsorted(inside, (first, first + len(logits_SV)))
        for at in range(begin, end, ROWS):
            wanted = inside[at : min(at + ROWS, end)]
            rows = slice(start + at, start + at + len(wanted))
            logits_nV = logits_SV[wanted - first]
            expected_nV = self._reference.log_probabilities_NV[rows].astype(np.float32)
            # A converter may leave out the rows that fill up a vocabulary, which no token has.
            num_vocab = min(logits_nV.shape[1], expected_nV.shape[1])
            found_nV = _log_softmax(logits_nV[:, :num_vocab])
            # Again, since float16's rounding leaves probabilities that do not sum up to 1.
            expected_nV = _log_softmax(expected_nV[:, :num_vocab])
            self._same_N[rows] = found_nV.argmax(1) == self._reference.best_N[rows]
            np.subtract(expected_nV, found_nV, out=found_nV)
            self.divergences_N[rows] = np.einsum("nv,nv->n", np.exp(expected_nV), found_nV)

    def by_example(self) -> pd.DataFrame:
        """Sums of the divergences in the columns of losses: `example_id`, `loss_sum`, `num_tokens`."""
        items = self._reference.rows.items()
        rows = [
            (example_id, self.divergences_N[start : start + len(inside)].sum(), len(inside))
            for example_id, (start, inside) in items
            if len(inside)
        ]
        return pd.DataFrame(rows, columns=["example_id", "loss_sum", "num_tokens"])

    @property
    def top_1(self) -> float:
        """Share of positions with the same likeliest token."""
        return float(self._same_N.mean())


def measure(
    path: Path,
    quantization: str,
    num_params: int,
    distances: Distances,
    losses: pd.DataFrame,
    merged: pd.DataFrame,
    num_types: int,
) -> Measurement:
    """One file's numbers, without its speed.

    Args:
        path: the GGUF.
        quantization: its type.
        num_params: parameters in it.
        distances: filled while the file's losses were computed.
        losses: per-example losses through llama.cpp.
        merged: those of the merged model, on the same examples.
        num_types: types among which one is recommended: each difference's interval is that wide that all
            of them hold together.
    """
    if not np.isfinite(distances.divergences_N).all():
        raise GateError(f"{path.name}: its logits are not finite, or were not computed everywhere")
    size_bytes = path.stat().st_size
    return Measurement(
        quantization=quantization,
        size_bytes=size_bytes,
        bits_per_weight=8 * size_bytes / num_params,
        num_positions=len(distances.divergences_N),
        kl=loss_interval(distances.by_example(), CONFIDENCE),
        kl_99=float(np.percentile(distances.divergences_N, 99)),
        top_1=distances.top_1,
        loss=loss_interval(losses, CONFIDENCE),
        difference=difference_interval(losses, merged, corrected(num_types, CONFIDENCE)),
    )


def measure_speed(path: Path, example: Mapping[str, Any]) -> Speed:
    """Tokens a second of a prompt of NUM_PROMPT_TOKENS made of the example's, and of the answer."""
    ids = list(example["input_ids"])
    prompt = (ids * (NUM_PROMPT_TOKENS // len(ids) + 1))[:NUM_PROMPT_TOKENS]
    with open_gguf(path, num_ctx=NUM_PROMPT_TOKENS + NUM_SPEED_TOKENS + 8) as gguf:
        return gguf.speed(prompt, NUM_SPEED_TOKENS, SPEED_LIMIT_S)


def recommend(measured: Sequence[Measurement], limits: Limits) -> Recommendation:
    """The smallest file that is not measurably worse than the merged model, or what the limits ask for.

    With `max_kl`, the smallest within it; with `max_size`, the one of least divergence that is no larger;
    with both, the smallest within both.
    """
    by_size = sorted(measured, key=lambda item: item.size_bytes)
    if limits.max_kl is not None:
        return _smallest_within_kl(by_size, limits.max_kl, limits.max_size_bytes)
    if limits.max_size_bytes is not None:
        return _best_within_size(by_size, limits.max_size_bytes)
    for item in by_size:
        if item.difference.high < MARGIN:
            return Recommendation(
                item.quantization,
                f"the smallest that is not measurably worse than the merged model (loss {_loss(item)}, "
                f"allowed {MARGIN:g})",
            )
    item = min(measured, key=lambda item: (item.difference.high, item.difference.estimate))
    return Recommendation(
        None,
        f"no type is shown to lose less than {MARGIN:g} nats a token against the merged model; nearest "
        f"is {item.quantization} ({_loss(item)})",
    )


def _smallest_within_kl(
    by_size: Sequence[Measurement], max_kl: float, max_size_bytes: int | None
) -> Recommendation:
    within = [item for item in by_size if item.kl.estimate <= max_kl]
    if not within:
        item = min(by_size, key=lambda item: item.kl.estimate)
        return Recommendation(
            None,
            f"no type's KL divergence is within --max_kl {max_kl:g}; nearest is {item.quantization} "
            f"with {item.kl.estimate:.2g}",
        )
    item = within[0]
    kl = f"KL divergence {item.kl.estimate:.2g}"
    if max_size_bytes is not None and item.size_bytes > max_size_bytes:
        return Recommendation(
            None,
            f"no type within --max_kl {max_kl:g} is within --max_size {_mb(max_size_bytes)}; nearest is "
            f"{item.quantization} with {_mb(item.size_bytes)} ({kl})",
        )
    return Recommendation(
        item.quantization, f"the smallest within --max_kl {max_kl:g} ({kl}, {_mb(item.size_bytes)})"
    )


def _best_within_size(by_size: Sequence[Measurement], max_size_bytes: int) -> Recommendation:
    within = [item for item in by_size if item.size_bytes <= max_size_bytes]
    if not within:
        item = by_size[0]
        return Recommendation(
            None,
            f"no type is within --max_size {_mb(max_size_bytes)}; nearest is {item.quantization} with "
            f"{_mb(item.size_bytes)}",
        )
    item = min(within, key=lambda item: item.kl.estimate)
    return Recommendation(
        item.quantization,
        f"the least KL divergence ({item.kl.estimate:.2g}) within --max_size {_mb(max_size_bytes)} "
        f"({_mb(item.size_bytes)})",
    )


def _targets(example: Mapping[str, Any]) -> np.ndarray:
    """The label that each position but the last predicts."""
    return np.asarray(example["labels"], np.int64)[1:]


def _log_softmax(logits_nV: np.ndarray) -> np.ndarray:
    shifted_nV = logits_nV - logits_nV.max(1, keepdims=True)
    return shifted_nV - np.log(np.exp(shifted_nV).sum(1, keepdims=True))


def _interval(interval: Interval) -> dict[str, float | None]:
    """For JSON, which has no infinities: perplexity's ends may be 0 and infinity."""
    known = math.isfinite(interval.high)
    return {
        "estimate": interval.estimate,
        "low": interval.low if known else None,
        "high": interval.high if known else None,
    }


def _loss(item: Measurement) -> str:
    difference = item.difference
    if not math.isfinite(difference.high):
        return f"{difference.estimate:+.4f}, of too few examples for an interval"
    return f"{difference.estimate:+.4f}, interval [{difference.low:+.4f}, {difference.high:+.4f}]"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
