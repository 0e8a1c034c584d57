"""A trial's state, saved whole or not at all, and restored into any pack on any device.

`capture(trial)` takes weights, AdamW's moments and the step; `restore(trial, state)` gives them to a trial of
the same settings; `save_state` and `load_state` put them into a directory, as safetensors and JSON.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.paths import read_json, write_directory, write_json
from training.trial import TrialState

VERSION = 2
"""Of the files; a state of another version is not used."""

_TENSORS = "state.safetensors"
_FACTS = "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class SavedState:
    """A trial between two optimizer steps."""

    step: int
    settings: dict[str, Any]
    layout: list[list[Any]]
    """Name and shape of every adapter matrix, in the order in which they stand in the vectors."""
    tensors: dict[str, torch.Tensor]
    """`weights`, `exp_avg` and `exp_avg_sq`, each float32 [P] in main memory."""
    record: dict[str, Any]
    """What else its owner keeps with it."""


def capture(trial: TrialState, record: dict[str, Any] | None = None) -> SavedState:
    """A copy of the trial's state, as of the end of its last optimizer step."""
    weights = trial.adapter.weights
    moments = trial.optimizer.state.get(weights) or {}
    tensors = {"weights": weights.detach()}
    tensors |= {name: moments.get(name, torch.zeros_like(weights)) for name in _MOMENTS}
    return SavedState(
        step=trial.step,
        settings=trial.config.to_dict(),
        layout=[[name, list(shape)] for name, shape in trial.adapter.layout],
        tensors={name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
        record=record or {},
    )


def restore(trial: TrialState, state: SavedState) -> None:
    """Puts a freshly admitted trial where `state` was captured.

    Raises:
        ValueError: the state's layers are others than the trial's, or it has more steps than the trial.
    """
    layout = [[name, list(shape)] for name, shape in trial.adapter.layout]
    if state.layout != layout or state.step > trial.config.max_steps:
        raise ValueError("the saved state is that of a trial with other layers or more steps")
    weights = trial.adapter.weights
    with torch.no_grad():
        weights.copy_(state.tensors["weights"])
    moments = {name: state.tensors[name].to(weights.device, copy=True) for name in _MOMENTS}
    step = torch.tensor(float(state.step), device=weights.device)
    trial.optimizer.state[weights] = {"step": step, **moments} if state.step else {}
    trial.step = state.step
    trial.forget_step()


def save_state(state: SavedState, directory: Path) -> None:
    """Writes the state in the place of what the directory held."""

    def write(draft: Path) -> None:
        save_file(state.tensors, draft / _TENSORS)
        facts = {"version": VERSION, "step": state.step, "settings": state.settings}
        write_json(draft / _FACTS, {**facts, "layout": state.layout, "record": state.record})

    write_directory(directory, write)


def load_state(directory: Path) -> SavedState | None:
    """The state in `directory`; None, with a warning unless nothing is there, if it cannot be used."""
    if not (directory / _FACTS).is_file():
        return None
    try:
        facts = read_json(directory / _FACTS)
        if facts["version"] != VERSION:
            raise ValueError(f"its version is {facts['version']}, but must be {VERSION}")
        tensors = load_file(directory / _TENSORS)
        return SavedState(
            facts["step"], facts["settings"], facts["layout"], tensors, facts["record"]
        )
    except (OSError, KeyError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        warnings.warn(
            f"{directory}: is not used: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
