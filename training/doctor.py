"""What to run first on a new machine: what is there, whether packed training is exact on it, how many slots.

Two trials of different length, batch and rank (but for grouped products, of one) are differentiated once in a
pack and once each alone through plain PEFT and the model's own attention, on this device. Under a minute with
the demo model.
"""

import platform
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

from training.cli import make_parser, parse, run_command
from training.config import TrialConfig
from training.exceptions import ModelError

_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "wandb", "optuna")
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}

_DESCRIPTION = """\
Check this machine before training on it: versions, device, memory, exactness of the packed engine, slots.

  python -m training.doctor                                      with the demo model
  python -m training.doctor --model_name_or_path meta-llama/Llama-3.2-1B-Instruct --load_in_4bit"""


@dataclass(kw_only=True)
class DoctorOptions:
    """Options of `python -m training.doctor` that are not settings of a trial."""

    num_steps: int = field(
        default=0, metadata={"help": "Steps that the speed is taken from; 0 is 3, or 20 on a GPU."}
    )


def main() -> None:
    config, options = parse(
        make_parser("training.doctor", _DESCRIPTION, [TrialConfig, DoctorOptions])
    )
    config.check("--")
    print_versions()
    from training.prepared import prepare  # torch and transformers take seconds to import

    print("model and data")
    prepared = prepare(config)
    problems = check_exactness(config, prepared.model)
    for line in speed_lines(config, prepared, options.num_steps):
        print(line)
    if problems:
        raise ModelError("; ".join(problems))
    print("this machine is fit for packed training")


def print_versions() -> None:
    """Versions, device and its memory."""
    import torch

    from training.model import find_device
    from training.planner import free_bytes

    print(f"python      {platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        print(f"{name:<11} {metadata.version(name)}")
    device = find_device()
    if device.type == "cuda":
        shown = torch.cuda.get_device_name(device)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        shown += f", bfloat16 {'yes' if bf16 else 'no'}"
    else:
        shown = f"{device.type}, {torch.get_num_threads()} threads"
    print(f"device      {shown}\nfree memory {free_bytes(device) / 2**30:.1f} GiB")


def check_exactness(config: TrialConfig, model: Any) -> list[str]:
    """Prints each check's largest difference; the failures, in words."""
    from training import attention, grouped_lora

    print("exactness   largest relative difference to each trial alone in PEFT")
    tolerance = _TOLERANCE[str(model.dtype).removeprefix("torch.")]
    problems = []

    def check(name: str, difference: float) -> None:
        is_right = difference <= tolerance  # NaN is not
        verdict = "ok" if is_right else "FAILED"
        print(f"            {name:<18} {difference:.1e}  (at most {tolerance:.0e})  {verdict}")
        if not is_right:
            problems.append(f"{name} differs by {difference:.1e} from each trial alone")

    check("fast attention", _difference(config, model))
    check("generic attention", _without_fast_paths(config, model))
    if grouped_lora.is_taken(model.device, model.dtype):
        check("grouped products", _difference(config, model, ranks=(16, 16)))
    switched_off = attention.disabled | grouped_lora.disabled
    if switched_off:
        print(f"            switched off: {', '.join(sorted(switched_off))}")
    return problems


def speed_lines(config: TrialConfig, prepared: Any, num_steps: int) -> list[str]:
    """Recommended slots, and trial-steps a second with one and with all of them."""
    from training.engine import PackedEngine
    from training.planner import describe_plan, plan_slots

    on_gpu = prepared.model.device.type == "cuda"
    num_steps = num_steps or (20 if on_gpu else 3)
    with PackedEngine(prepared.model) as engine:
        plan = plan_slots(engine, config, prepared.train)
        lines = [f"slots       {describe_plan(plan, plan.slots)}"]
        for slots in sorted({1, plan.slots}):
            while len(engine.trials) < slots:
                engine.admit(config, prepared.train, f"speed{len(engine.trials)}")
            for _ in range(5 if on_gpu else 1):  # a GPU loads its kernels at their first use
                engine.step()
            started = time.perf_counter()
            for _ in range(num_steps):
                engine.step()
            rate = num_steps * slots / (time.perf_counter() - started)
            lines.append(f"speed       {rate:.2f} trial-steps a second with {slots} in the pack")
    return lines


def _without_fast_paths(config: TrialConfig, model: Any) -> float:
    from training.attention import FAST_PATHS, disabled

    before = set(disabled)
    disabled.update(FAST_PATHS)
    try:
        return _difference(config, model)
    finally:
        disabled.intersection_update(before)


def _difference(config: TrialConfig, model: Any, ranks: tuple[int, int] = (8, 16)) -> float:
    """Largest difference of losses and of adapter gradients, relative to the largest gradient."""
    from training.engine import PackedEngine
    from training.examples import Examples

    trials = [
        (_changed(config, lora_r=ranks[0], batch=2, seed=1), _random_examples(model, 5, 40)),
        (_changed(config, lora_r=ranks[1], batch=3, seed=2), _random_examples(model, 7, 90)),
    ]
    differences = []
    with PackedEngine(model) as engine:
        states = [engine.admit(c, Examples(data), f"t{n}") for n, (c, data) in enumerate(trials)]
        for state in states:
            _fill(state.adapter.weights)
        weights = [state.adapter.weights.detach().clone() for state in states]
        row, loss_N = engine.backward(states)
        grads = [state.adapter.weights.grad.clone() for state in states]  # pyright: ignore[reportOptionalMemberAccess]
        owner_N = np.searchsorted([2], row.sequence_N, side="right")
        losses = [float((loss_N * row.weight_N).cpu()[owner_N == n].sum()) for n in (0, 1)]
        layouts = [state.adapter.layout for state in states]
        batches = [state.order.micro_batches(0)[0] for state in states]
    for n, (trial_config, data) in enumerate(trials):
        loss, grad = _alone(trial_config, model, data, batches[n], weights[n], layouts[n])
        differences.append(abs(losses[n] - loss) / abs(loss))
        differences.append(float((grads[n] - grad).abs().max() / grad.abs().max()))
    return float(np.max(differences))


def _alone(
    config: TrialConfig, model: Any, data: Any, batch: Any, weights: Any, layout: Any
) -> tuple[float, Any]:
    """Loss and gradient of one micro-batch through PEFT's own layers, padded, in the vector's order."""
    import torch
    from peft import get_peft_model

    from training.engine import lora_config
    from training.packed_lora import known_warnings

    with known_warnings():
        adapted: Any = get_peft_model(model, lora_config(config))
    try:
        ordered = [_peft_weight(model, name) for name, _ in layout]
        for parameter, values in zip(ordered, _pieces(weights, layout), strict=True):
            parameter.data.copy_(values)
        rows = [data[int(index)] for index in batch]
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "labels": -100}
        ids, labels = (
            torch.tensor([list(row[key]) + [fill[key]] * (length - len(row[key])) for row in rows])
            for key in ("input_ids", "labels")
        )
        mask = torch.tensor([[n < len(row["input_ids"]) for n in range(length)] for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        output = adapted(**{key: value.to(model.device) for key, value in inputs.items()})
        output.loss.backward()
        grads = [
            parameter.grad.T if name.endswith("lora_B") else parameter.grad
            for parameter, (name, _) in zip(ordered, layout, strict=True)
        ]
        return float(output.loss.detach()), torch.cat([grad.reshape(-1).float() for grad in grads])
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.requires_grad_(False)


def _peft_weight(model: Any, name: str) -> Any:
    module, _, letter = name.rpartition(".")
    return getattr(model.get_submodule(module), letter)["default"].weight


def _pieces(weights: Any, layout: Any) -> list[Any]:
    """The matrices of a vector; B stands in it transposed (training.packed_lora)."""
    pieces, place = [], 0
    for name, (rows, columns) in layout:
        piece = weights[place : place + rows * columns]
        place += rows * columns
        pieces.append(
            piece.view(columns, rows).T if name.endswith("lora_B") else piece.view(rows, columns)
        )
    return pieces


def _changed(config: TrialConfig, *, lora_r: int, batch: int, seed: int) -> TrialConfig:
    settings = {"lora_r": lora_r, "per_device_train_batch_size": batch, "seed": seed}
    plain = {"lora_dropout": 0.0, "gradient_accumulation_steps": 1}
    return TrialConfig.from_dict({**config.to_dict(), **settings, **plain})


def _fill(weights: Any) -> None:
    """PEFT begins with B = 0, where A's gradient is nothing to compare."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights.data += 0.01 * torch.randn(weights.shape, generator=generator).to(weights.device)


def _random_examples(model: Any, num: int, longest: int) -> Any:
    from datasets import Dataset

    generator = np.random.default_rng(longest)
    vocabulary = model.config.get_text_config().vocab_size
    prefix = generator.integers(0, vocabulary, 6)
    rows = []
    for index in range(num):
        tokens = generator.integers(0, vocabulary, int(generator.integers(8, longest)))
        tokens = np.concatenate([prefix, tokens])
        labels = np.where(np.arange(len(tokens)) < 10, -100, tokens)
        rows.append({"example_id": str(index), "input_ids": tokens, "labels": labels})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    run_command(main)
