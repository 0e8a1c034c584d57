"""How many trials a pack should hold on this device, from what one trial measurably needs.

A forward pass of a short row counts the bytes that autograd keeps a token; the adapter, its gradient and
AdamW's moments are sixteen bytes a parameter. What is free, less a reserve, is divided by that.
"""

from dataclasses import dataclass

import numpy as np
import psutil
import torch

from training.config import TrialConfig
from training.engine import PackedEngine, lora_config
from training.examples import Examples
from training.exceptions import ConfigError

RESERVE = 0.2
"""Share of the free memory that is left alone: fragmentation, the head's chunk of logits, other programs."""
MOST_SLOTS = {"cpu": 8, "cuda": 16, "mps": 8}
"""More trials at once gain little: see docs/performance.md for the CPU; not measured on GPUs."""

_BYTES_PER_PARAMETER = 16
"""Weight, gradient and two moments in float32."""
_BYTES_PER_STACKED_PARAMETER = 14
"""Besides, while a row is computed on a GPU: the weight in two types, its gradient, its scaling."""
_PROBE_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A pack's size and its reasons."""

    slots: int
    fitting: int
    """Trials that fit into the memory; `slots` may be fewer, where more would gain little."""
    trial_bytes: int
    """Needed by one more trial: adapter, gradient, moments, and the activations of its longest batch."""
    free_bytes: int


def plan_slots(engine: PackedEngine, config: TrialConfig, examples: Examples) -> Plan:
    """Measures one trial of `config` and divides the free memory by it; never fewer than one slot."""
    device = engine.model.device
    bytes_per_parameter = _BYTES_PER_PARAMETER
    if engine.lora.is_grouped:
        bytes_per_parameter += _BYTES_PER_STACKED_PARAMETER
    adapter_bytes = bytes_per_parameter * num_adapter_parameters(engine, config)
    longest = np.sort(examples.lengths)[-config.per_device_train_batch_size :]
    trial_bytes = adapter_bytes + int(bytes_per_token(engine) * longest.sum())
    free = free_bytes(device)
    fitting = max(1, int(free * (1 - RESERVE) // trial_bytes))
    slots = min(fitting, MOST_SLOTS.get(device.type, 1))
    return Plan(slots=slots, fitting=fitting, trial_bytes=trial_bytes, free_bytes=free)


def describe_plan(plan: Plan, slots: int) -> str:
    """`8 slots: a trial needs 0.9 GiB of 20.1 GiB free`."""
    need, free = plan.trial_bytes / 2**30, plan.free_bytes / 2**30
    return f"{slots} slot{'s' * (slots > 1)}: a trial needs {need:.2f} GiB of {free:.1f} GiB free"


def check_slots(plan: Plan, slots: int) -> None:
    """Refuses more slots than fit.

    Raises:
        ConfigError: with what a trial needs and what is free.
    """
    if slots > plan.fitting:
        need, free = plan.trial_bytes / 2**30, plan.free_bytes / 2**30
        raise ConfigError(
            f"--slots is {slots}, but must be <= {plan.fitting} here: a trial needs {need:.2f} GiB of "
            f"{free:.1f} GiB free"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that a pack on `device` may still take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def num_adapter_parameters(engine: PackedEngine, config: TrialConfig) -> int:
    """Parameters of the trial's adapter."""
    targets = set(engine.lora.targets(lora_config(config)))
    return config.lora_r * sum(
        layer.in_features + layer.out_features
        for group in engine.lora.groups
        for name, layer in zip(group.names, group.layers, strict=True)
        if name in targets
    )


def bytes_per_token(engine: PackedEngine) -> float:
    """What autograd keeps of one token's forward pass until the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.data_ptr() for parameter in engine.model.parameters()}
    tokens = np.zeros(_PROBE_TOKENS, np.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_TD = engine.hidden_states_of([(tokens, tokens)])
    del hidden_TD
    return sum(kept.values()) / _PROBE_TOKENS
