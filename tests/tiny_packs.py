"""Tiny random models, trials and data, trained in a pack and alone in TRL, for tests to compare."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from training.config import TrialConfig
from training.engine import PackedEngine
from training.evaluate import example_losses, mean_loss
from training.examples import Examples
from training.model import load_tokenizer
from training.trial import StepResult, TrialState

VOCABULARY = 128
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOLERANCE = 1e-4


def make_config(**settings: Any) -> TrialConfig:
    defaults = {
        "max_steps": 50,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 3,
        "lora_r": 4,
        "dtype": "float32",
    }
    return TrialConfig.from_dict({**defaults, **settings})


def make_model(kind: type = transformers.LlamaConfig, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = kind(**{**TINY, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model.requires_grad_(False)


def make_examples(num: int = 31, longest: int = 24, seed: int = 1) -> Dataset:
    """Sequences with a common beginning, as a chat template gives them."""
    generator = np.random.default_rng(seed)
    prefix = generator.integers(3, VOCABULARY, 4)
    rows = []
    for index in range(num):
        length = int(generator.integers(2, longest))
        tokens = np.concatenate([prefix, generator.integers(3, VOCABULARY, length)])
        labels = np.where(generator.random(len(tokens)) < 0.4, -100, tokens)
        labels[: len(prefix)] = -100
        labels[-1] = tokens[-1]
        row = {"example_id": f"e{index}", "input_ids": tokens, "labels": labels}
        rows.append(row)
    return Dataset.from_list(rows)


TRAIN, VALIDATION = make_examples(), make_examples(9, seed=2)


@dataclasses.dataclass
class Run:
    """What a finished trial is compared by."""

    steps: list[tuple[float, float, float]]
    """Loss, gradient norm and learning rate of every step."""
    eval_loss: float
    weights: dict[str, torch.Tensor]


def run_alone(config: TrialConfig, model: Any, directory: Path, train: Dataset = TRAIN) -> Run:
    """The trial in plain TRL and PEFT."""
    steps = []

    class Record(transformers.TrainerCallback):
        rate = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.rate = kwargs["optimizer"].param_groups[0]["lr"]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                steps.append((logs["loss"], float(logs["grad_norm"]), self.rate))

    targets = config.lora_target_modules
    is_wsd = config.lr_scheduler_type == "warmup_stable_decay"
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(directory),
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            lr_scheduler_kwargs=(
                {"num_decay_steps": round(0.2 * config.max_steps), "decay_type": "1-sqrt"}
                if is_wsd
                else {}
            ),
            warmup_steps=config.warmup_steps,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            max_length=None,
            logging_steps=1,
            logging_nan_inf_filter=False,
            activation_checkpointing=False,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=train.select_columns(["input_ids", "labels"]),
        processing_class=load_tokenizer(TrialConfig()),
        peft_config=LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
            use_rslora=config.use_rslora,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        ),
        callbacks=[Record()],
    )
    trainer.train()
    adapted: Any = trainer.model
    loss = mean_loss(example_losses(adapted.get_base_model(), VALIDATION, 4))
    return Run(steps, loss, get_peft_model_state_dict(adapted))


def finish(engine: PackedEngine, trials: list[TrialState], directory: Path) -> list[Run]:
    """Trains to the end, retiring each trial when it is done."""
    steps: dict[str, list[StepResult]] = {trial.adapter.name: [] for trial in trials}
    runs: dict[str, Run] = {}
    while engine.trials:
        for trial, result in engine.step():
            name = trial.adapter.name
            steps[name].append(result)
            if trial.is_done:
                runs[name] = close(engine, trial, steps[name], directory / name)
    return [runs[trial.adapter.name] for trial in trials]


def close(engine: PackedEngine, trial: TrialState, steps: list[StepResult], directory: Path) -> Run:
    loss = mean_loss(engine.evaluate(trial, Examples(VALIDATION)))
    engine.lora.save(trial.adapter.name, directory)
    engine.retire(trial)
    weights = load_file(directory / "adapter_model.safetensors")
    curve = [(result.train_loss, result.grad_norm, result.learning_rate) for result in steps]
    return Run(curve, loss, weights)


def run_packed(
    configs: list[TrialConfig], model: Any, directory: Path, train: Dataset = TRAIN
) -> list[Run]:
    with PackedEngine(model) as engine:
        examples = Examples(train)
        trials = [engine.admit(config, examples, f"t{n}") for n, config in enumerate(configs)]
        return finish(engine, trials, directory)


def assert_equal(ours: Run, reference: Run, tolerance: float = TOLERANCE) -> None:
    assert len(ours.steps) == len(reference.steps)
    np.testing.assert_allclose(ours.steps, reference.steps, rtol=tolerance)
    assert ours.eval_loss == pytest.approx(reference.eval_loss, rel=tolerance)
    assert ours.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        scale = float(weight.abs().max())
        assert torch.allclose(ours.weights[name], weight, rtol=tolerance, atol=tolerance * scale)
