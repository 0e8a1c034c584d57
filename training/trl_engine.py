"""One trial through TRL's SFTTrainer and PEFT: the reference that every other engine must equal.

The trainer gets tokenised data, so that the labels are ours; everything else of the update is TRL's.
"""

import contextlib
import functools
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from training.config import TrialConfig
from training.engine import lora_config
from training.evaluate import example_losses, mean_loss
from training.exceptions import ModelError, nearest
from training.job import Job, JobOptions, Trials
from training.packed_lora import known_warnings
from training.paths import TrialPaths, write_json
from training.prepared import Prepared, forget, prepare
from training.recorder import TrialRecorder, begin_trial, end_with_fault, is_disk_full
from training.samples import Sampler
from training.schedules import scheduler_kwargs
from training.tracking import Tracker

ENGINE = "trl"

Sample = Callable[[int, float, Any], float]
"""Samples a trial at a step with its loss, if it is to be; returns seconds."""


def run_with_trl(trials: Trials, options: JobOptions) -> None:
    """Trains until `trials` has nothing, each from settings to result.json."""
    sampler = Sampler(options.num_samples, options.display.console.print)
    while (job := trials.next_job()) is not None:
        _run_trial(job, trials, sampler, options)


def _run_trial(job: Job, trials: Trials, sampler: Sampler, options: JobOptions) -> None:
    tracker: Tracker | None = None
    shutil.rmtree(job.paths.root, ignore_errors=True)  # this engine cannot go on where it was
    begin_trial(job.config, job.paths, job.info, ENGINE)
    try:
        prepared = prepare(job.config)
        tracker = options.tracker(job)
        sample = functools.partial(_sample, job, prepared, trials, sampler)
        result = _train(job, prepared, tracker, options, sample)
    except BaseException as error:
        end_with_fault(error, job.paths, tracker)
        if is_disk_full(error) or not isinstance(error, Exception):
            raise
        forget()  # the model may not be what it was
        trials.done(job, error)
        return
    write_json(job.paths.result, result)
    tracker.finish(result)
    trials.done(job, result)


def _sample(
    job: Job,
    prepared: Prepared,
    trials: Trials,
    sampler: Sampler,
    step: int,
    loss: float,
    model: Any,
) -> float:
    """Lets the trial answer the fixed prompts, if samples are wanted and it leads; the seconds that took."""
    started = time.monotonic()
    if sampler.num_samples and trials.leads(job, step, loss):
        sampler.write(job, prepared, step, contextlib.nullcontext(model))
    return time.monotonic() - started


def _train(
    job: Job, prepared: Prepared, tracker: Tracker, options: JobOptions, sample: Sample
) -> dict[str, Any]:
    config, started = job.config, time.monotonic()
    losses = example_losses(
        prepared.model, prepared.splits.validation, config.per_device_eval_batch_size
    )
    with options.display as display:
        progress = display.add(job.label, config.max_steps)
        recorder = TrialRecorder(job.paths, tracker, progress, losses)
        try:
            callback = _RecordingCallback(job, prepared, recorder, options.stop, sample)
            state, reason = train_with_trl(job, prepared, callback)
            recorder.train_time_s = time.monotonic() - started - callback.sampling_s
            return {**recorder.result(state, reason), **prepared.splits.hashes}
        finally:
            recorder.close()
            shutil.rmtree(job.paths.state, ignore_errors=True)


def train_with_trl(
    job: Job, prepared: Prepared, callback: "_RecordingCallback"
) -> tuple[str, str | None]:
    """Trains the trial to its end, or until its stop is set; the base model is afterwards as it was.

    Returns:
        The trial's state, and why it failed (a loss that is not finite) or was stopped.
    """
    config = job.config
    with _base_model_restored(prepared.model), known_warnings():
        _check_targets(config, prepared.model)
        args = sft_config(config, job.paths, prepared.model)
        # The trial is one GPU's: with several visible, Trainer would multiply the batch by their number.
        _ = args.device
        args._n_gpu = min(1, args._n_gpu)
        trainer = SFTTrainer(
            model=prepared.model,
            args=args,
            train_dataset=prepared.splits.train.select_columns(["input_ids", "labels"]),
            processing_class=prepared.tokenizer,
            peft_config=lora_config(config),
            callbacks=[callback],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
        callback.model = adapted = trainer.model
        assert adapted is not None
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                # On a 4-bit base TRL rounds the adapter to bfloat16, which loses small updates.
                parameter.data = parameter.data.float()
        try:
            trainer.train()
        finally:
            callback.model.unload()
            callback.model = None
    return callback.state, callback.reason


def sft_config(config: TrialConfig, paths: TrialPaths, model: Any) -> SFTConfig:
    """TRL's configuration of the trial; what it does besides training is switched off."""
    return SFTConfig(
        output_dir=str(paths.state),
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=scheduler_kwargs(config),
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
        use_cpu=model.device.type == "cpu",
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


def _check_targets(config: TrialConfig, model: Any) -> None:
    """PEFT takes no notice of a name that matches nothing as long as another one matches."""
    if config.lora_target_modules == ["all-linear"]:
        return
    names = [name for name, _ in model.named_modules()]
    for target in config.lora_target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names if name})
            raise ModelError(
                f"lora_target_modules names {target!r}, but {type(model).__name__} has no such layer"
                f"{nearest(target, leaves)}"
            )


class _RecordingCallback(TrainerCallback):
    """Hands each step and each evaluation to the recorder."""

    def __init__(
        self,
        job: Job,
        prepared: Prepared,
        recorder: TrialRecorder,
        stop: threading.Event,
        sample: Sample,
    ):
        self.job, self.config, self.prepared, self.recorder = job, job.config, prepared, recorder
        self.stop, self.sample = stop, sample
        self.sampling_s = 0.0
        self.model: Any = None
        self.state = "complete"
        self.reason: str | None = None
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
        if self.stop.is_set():
            raise KeyboardInterrupt

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
            self._end("failed", f"train/loss is {logs['loss']} at step {step}", control)
        elif self.job.stop_reason and step < self.config.max_steps:
            self._end("pruned", self.job.stop_reason, control)
        elif step % self.config.eval_steps == 0 or step == self.config.max_steps:
            self._evaluate(step, control)

    def _evaluate(self, step: int, control: Any) -> None:
        losses = example_losses(
            self.model.get_base_model(),
            self.prepared.splits.validation,
            self.config.per_device_eval_batch_size,
        )
        self.recorder.log_eval(step, losses, self.model.save_pretrained)
        loss = mean_loss(losses)
        if not math.isfinite(loss):
            self._end("failed", f"eval/loss is not finite at step {step}", control)
        else:
            self.sampling_s += self.sample(step, loss, self.model)

    def _end(self, state: str, reason: str, control: Any) -> None:
        self.state, self.reason = state, reason
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
