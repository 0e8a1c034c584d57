"""The flat token row: the sequences of several trials one after the other, without padding.

Each trial owns one *stretch* of the row. Where its sequences begin with the same tokens (a system prompt),
these stand in the stretch once, and the attention of every sequence reads them: with the same weights and
without dropout they have the same hidden states. So a sequence is a *piece*: its own tokens, and the
prefix before them.

T tokens in the row, S sequences, N supervised tokens, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from training.chat import IGNORE
from training.examples import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one trial puts into a row."""

    adapter: str | None
    """Name of the trial's adapter; None is the base model."""
    sequences: list[Sequence]
    weight: float = 0.0
    """Factor of each token's loss in the sum that is differentiated."""
    shares_prefix: bool = True
    """False where dropout makes the same tokens differ from sequence to sequence."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens `[start, end)` of the row, all of one adapter."""

    adapter: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `[start, end)` of a sequence, which see `[prefix_start, prefix_end)` and each other causally."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(kw_only=True, slots=True)
class Row:
    """One forward pass."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    stretches: list[Stretch]
    pieces: list[Piece]
    predict_N: torch.Tensor
    """Places in the row whose hidden state predicts a supervised token."""
    target_N: torch.Tensor
    weight_N: torch.Tensor
    sequence_N: np.ndarray
    """Number of the sequence, counted over all parts, that each supervised token belongs to."""
    num_sequences: int
    dropout_seeds: dict[str, int] = field(default_factory=dict)
    """Adapter -> seed of this row's dropout masks; empty when nothing is dropped."""
    runs: list[Any] = field(default_factory=list)
    """The `training.grouped_lora.Run`s of its stretches; found before the first layer."""
    attention_calls: int = 0
    """Layers that have attended so far."""
    variable_length: dict[str, Any] | None = None
    """Arguments of the CUDA kernel, made by the first layer."""

    def __len__(self) -> int:
        return len(self.ids_T)


def build_row(parts: list[Part], device: torch.device) -> Row:
    """Lays the parts' sequences into one row."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predict: list[np.ndarray] = []
    target: list[np.ndarray] = []
    weight: list[np.ndarray] = []
    sequence: list[np.ndarray] = []
    stretches: list[Stretch] = []
    pieces: list[Piece] = []
    place = number = 0
    for part in parts:
        first = place
        prefix = shared_prefix(part.sequences) if part.shares_prefix else 0
        if prefix:
            ids.append(part.sequences[0][0][:prefix])
            positions.append(np.arange(prefix))
            pieces.append(Piece(place, place + prefix))
            place += prefix
        for tokens, labels in part.sequences:
            own = len(tokens) - prefix
            ids.append(tokens[prefix:])
            positions.append(np.arange(prefix, len(tokens)))
            pieces.append(Piece(place, place + own, first, first + prefix))
            supervised = np.flatnonzero(labels[1:] != IGNORE)  # place t predicts token t + 1
            predict.append(supervised - prefix + place)
            target.append(labels[1:][supervised])
            weight.append(np.full(len(supervised), part.weight, np.float32))
            sequence.append(np.full(len(supervised), number))
            place += own
            number += 1
        stretches.append(Stretch(part.adapter, first, place))
    return Row(
        ids_T=_tensor(ids, device),
        positions_T=_tensor(positions, device),
        stretches=stretches,
        pieces=pieces,
        predict_N=_tensor(predict, device),
        target_N=_tensor(target, device),
        weight_N=torch.from_numpy(np.concatenate(weight)).to(device),
        sequence_N=np.concatenate(sequence),
        num_sequences=number,
    )


def shared_prefix(sequences: list[Sequence]) -> int:
    """How many first tokens all sequences share without any of them predicting a supervised one."""
    if len(sequences) < 2:
        return 0
    shortest = min(len(tokens) for tokens, _ in sequences)
    first = sequences[0][0][:shortest]
    length = shortest
    for tokens, labels in sequences:
        differs = np.flatnonzero(tokens[:length] != first[:length])
        if len(differs):
            length = int(differs[0])
        supervised = np.flatnonzero(labels[1 : length + 1] != IGNORE)
        if len(supervised):
            length = int(supervised[0])
    return length


_current: Row | None = None


@contextmanager
def current(row: Row) -> Iterator[None]:
    """Makes `row` the one that attention and LoRA layers see; a model's forward hands on no such thing."""
    global _current
    before, _current = _current, row
    try:
        yield
    finally:
        _current = before


def current_row() -> Row:
    """The row of the forward pass that is running."""
    assert _current is not None, "a packed layer runs inside `with current(row)` only"
    return _current


def _tensor(arrays: list[np.ndarray], device: torch.device) -> torch.Tensor:
    joined = np.concatenate(arrays).astype(np.int64, copy=False)
    return torch.from_numpy(joined).to(device, non_blocking=True)
