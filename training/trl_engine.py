"""One trial through TRL's SFTTrainer and PEFT: the reference that every other engine must equal.

The trainer gets tokenised data, so that the labels are ours; everything else of the update is TRL's.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from training.config import TrialConfig
from training.evaluate import example_losses, mean_loss
from training.paths import TrialPaths
from training.prepared import Prepared
from training.recorder import TrialRecorder

ENGINE = "trl"


def train_with_trl(
    config: TrialConfig, prepared: Prepared, paths: TrialPaths, recorder: TrialRecorder
) -> str | None:
    """Trains the trial to its end; the base model is afterwards as it was.

    Returns:
        Why the trial failed (a loss that is not finite), or None.
    """
    with _base_model_restored(prepared.model), _known_warnings():
        callback = _RecordingCallback(config, prepared, recorder)
        trainer = SFTTrainer(
            model=prepared.model,
            args=sft_config(config, paths, prepared.model),
            train_dataset=prepared.splits.train.select_columns(["input_ids", "labels"]),
            processing_class=prepared.tokenizer,
            peft_config=lora_config(config),
            callbacks=[callback],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
        callback.model = trainer.model
        try:
            trainer.train()
        finally:
            callback.model.unload()
            callback.model = None
    return callback.failure


def lora_config(config: TrialConfig) -> LoraConfig:
    """PEFT's configuration of the trial's adapter."""
    targets = config.lora_target_modules
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] - any number works
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )


def sft_config(config: TrialConfig, paths: TrialPaths, model: Any) -> SFTConfig:
    """TRL's configuration of the trial; what it does besides training is switched off."""
    return SFTConfig(
        output_dir=str(paths.state),
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        bf16=model.dtype == torch.bfloat16,
        max_length=None,  # the examples are cut already
        packing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would report the last finite loss in place of a NaN
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda",
    )


class _RecordingCallback(TrainerCallback):
    """Hands each step and each evaluation to the recorder."""

    def __init__(self, config: TrialConfig, prepared: Prepared, recorder: TrialRecorder):
        self.config, self.prepared, self.recorder = config, prepared, recorder
        self.model: Any = None
        self.failure: str | None = None
        self.learning_rate = 0.0
        self.num_tokens = 0
        self.started = 0.0
        self.step_time_s = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        # The scheduler moves on before the trainer logs: this is the rate that the step uses.
        self.learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_time_s = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return  # the trainer's summary after the last step
        step, num_tokens = state.global_step, int(logs["num_tokens"])
        self.recorder.log_step(
            step,
            train_loss=logs["loss"],
            learning_rate=self.learning_rate,
            num_tokens=num_tokens - self.num_tokens,
            step_time_s=self.step_time_s,
            grad_norm=logs.get("grad_norm"),
        )
        self.num_tokens = num_tokens
        if not math.isfinite(logs["loss"]):
            self._fail(f"train/loss is {logs['loss']} at step {step}", control)
        elif step % self.config.eval_steps == 0 or step == self.config.max_steps:
            self._evaluate(step, control)

    def _evaluate(self, step: int, control: Any) -> None:
        losses = example_losses(
            self.model.get_base_model(),
            self.prepared.splits.validation,
            self.config.per_device_eval_batch_size,
        )
        self.recorder.log_eval(step, losses, self.model.save_pretrained)
        if not math.isfinite(mean_loss(losses)):
            self._fail(f"eval/loss is not finite at step {step}", control)

    def _fail(self, reason: str, control: Any) -> None:
        self.failure = reason
        control.should_training_stop = True


@contextlib.contextmanager
def _base_model_restored(model: Any) -> Iterator[None]:
    """Takes back what trainer and PEFT leave on the model that they were given."""
    forward = model.__dict__.get("forward")
    try:
        yield
    finally:
        # TRL binds a forward of its own to the instance; a second trial would wrap it again.
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward
        if hasattr(model, "peft_config"):
            del model.peft_config
        if model.is_activation_checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()
        model.requires_grad_(False)


@contextlib.contextmanager
def _known_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 and TRL 1.16 still use the names that Transformers 5.23 has given up.
        warnings.filterwarnings(
            "ignore", message=".*gradient_checkpointing.*", category=FutureWarning
        )
        yield
