"""PackedEngine: several trials trained at once over one frozen base model, each exactly as if alone.

A `step` takes one micro-batch of every trial, lays them into one row, runs the base model once over all of
them, and puts each trial's gradient into its own vector; a trial whose optimizer step is complete is clipped
and updated by itself. Trials come (`admit`) and go (`retire`) between any two steps. Nothing that a trial
computes depends on its pack-mates: rows of a matrix product do not mix, attention stays within a sequence,
and loss, gradient, moments and schedule are the trial's own.

T tokens of the row, N supervised tokens, D hidden.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from training import attention, grouped_lora
from training.attention import packed_attention_of
from training.config import TrialConfig
from training.evaluate import check_head
from training.examples import Examples, Sequence
from training.exceptions import ModelError
from training.head import token_losses, weighted_loss
from training.packed_lora import PackedLora
from training.row import Part, Row, build_row, current
from training.trial import StepResult, TrialState

ENGINE = "packed"
EVAL_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of an evaluation's row, fewer where memory is short; longer examples have rows of their own.

A GPU takes about as long for a short row as for a long one."""


class PackedEngine:
    """Trains the trials of one pack.

    Args:
        model: the frozen base model. It is changed while the engine is open, and given back by `close`.

    Raises:
        ModelError: the model cannot be packed, with the reason; `--engine trl` trains it.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel):
        check_model(model)
        self.model = model
        self.trials: list[TrialState] = []
        self.eval_tokens = EVAL_TOKENS.get(model.device.type, EVAL_TOKENS["cpu"])
        self._open = contextlib.ExitStack()
        self.own_attention = model.config._attn_implementation or "eager"
        check_head(model, _check_sequences(model)[0][0][:8].tolist())
        expected = _hidden_states_alone(model)
        self.lora = PackedLora(model)
        self._open.callback(self.lora.close)
        try:
            self._open.enter_context(packed_attention_of(model))
            self._check_exact(expected)
            self._check_grouped_products()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the base model back as it was."""
        self._open.close()

    def admit(self, config: TrialConfig, examples: Examples, name: str) -> TrialState:
        """A new trial in the pack, before its first step.

        Args:
            config: its settings.
            examples: its train split.
            name: of its adapter, unique in the pack.

        Raises:
            ModelError: its target modules are not there, or an example is longer than the model allows.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = int(examples.lengths.max())
        if limit is not None and longest > limit:
            raise ModelError(
                f"max_length is {config.max_length}, and an example has {longest} tokens, but "
                f"{type(self.model).__name__} has {limit} positions"
            )
        adapter = self.lora.add(name, lora_config(config), config.seed)
        trial = TrialState(config=config, examples=examples, adapter=adapter)
        self.trials.append(trial)
        return trial

    def retire(self, trial: TrialState) -> None:
        """Takes a trial out of the pack; its adapter is no longer in the model."""
        self.trials.remove(trial)
        self.lora.remove(trial.adapter.name)

    def step(self) -> list[tuple[TrialState, StepResult]]:
        """One micro-batch of every trial; the trials whose optimizer step that completed.

        Raises:
            torch.OutOfMemoryError: after which every trial is at the beginning of its optimizer step.
        """
        # Trials that adapt the same layers stand side by side: so their products can be grouped.
        trials = sorted(self.trials, key=lambda trial: _adapted_layers(trial.config))
        parts = [trial.next_part() for trial in trials]
        try:
            row, loss_N = self.backward(trials, parts)
        except torch.OutOfMemoryError:
            for trial in trials:
                trial.forget_step()
            raise
        sums = _sum_by(row.sequence_N, (loss_N * row.weight_N).double(), row.num_sequences)
        complete, first = [], 0
        for trial, part in zip(trials, parts, strict=True):
            last = first + len(part.sequences)
            num_tokens = sum(len(tokens) for tokens, _ in part.sequences)
            if trial.took(float(sums[first:last].sum()), num_tokens):
                complete.append(trial)
            first = last
        if not complete:
            return []
        norms = torch.stack([trial.adapter.gradient_norm() for trial in complete]).tolist()
        return [(trial, trial.update(norm)) for trial, norm in zip(complete, norms, strict=True)]

    def evaluate(self, trial: TrialState | None, examples: Examples) -> pd.DataFrame:
        """Held-out loss of every example, as `training.evaluate.example_losses` gives it.

        Args:
            trial: whose adapter to use; None is the base model.
            examples: the split.

        Raises:
            torch.OutOfMemoryError: one example alone does not fit; rows of several are made smaller until
                they do, and stay so.
        """
        loss_sum = np.zeros(len(examples))
        order = np.argsort(-examples.lengths, kind="stable")  # what does not fit fails at once
        while len(order):
            indices = order[: _num_fitting(examples.lengths[order], self.eval_tokens)]
            sums = self._loss_sums(trial, examples, indices)
            if sums is None:
                self.eval_tokens = int(examples.lengths[indices].sum()) // 2
                if self.model.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            loss_sum[indices] = sums
            order = order[len(indices) :]
        return pd.DataFrame(
            {
                "example_id": examples.ids,
                "loss_sum": loss_sum,
                "num_tokens": examples.num_supervised,
            }
        )

    @torch.no_grad()
    def _loss_sums(
        self, trial: TrialState | None, examples: Examples, indices: np.ndarray
    ) -> np.ndarray | None:
        """The loss of each of these examples, in one row; None if they do not fit, and are several."""
        adapter = trial.adapter.name if trial else None
        part = Part(adapter=adapter, sequences=[examples[index] for index in indices])
        try:
            row = build_row([part], self.model.device)
            hidden_ND = self._hidden_states(row)[row.predict_N]
            loss_N = token_losses(self.model, hidden_ND, row.target_N)
            return _sum_by(row.sequence_N, loss_N.double(), row.num_sequences)
        except torch.OutOfMemoryError:
            if len(indices) == 1:
                raise
            return None  # the caller tries again when this frame, and so its tensors, are gone

    @contextlib.contextmanager
    def unpacked(self, trial: TrialState) -> Iterator[PeftModel]:
        """The base model with one trial's adapter as PEFT and Transformers themselves compute it.

        For what reads no row, such as `generate`. No step may be taken meanwhile.
        """
        peft = self.lora.peft
        members: list[Any] = [member for group in self.lora.groups for member in group.members]
        forwards = [vars(member).pop("forward") for member in members]
        active = peft.active_adapter
        try:
            self.model.set_attn_implementation(self.own_attention)
            peft.set_adapter(trial.adapter.name)
            yield peft
        finally:
            peft.set_adapter(active)  # pyright: ignore[reportArgumentType] - a name, or several
            self.model.requires_grad_(False)  # PEFT marks the adapter that it makes active
            self.model.set_attn_implementation(attention.NAME)
            for member, forward in zip(members, forwards, strict=True):
                member.forward = forward

    def hidden_states_of(self, sequences: list[Sequence]) -> torch.Tensor:
        """The base model's last hidden states of a row of sequences, [T, D], with a graph to measure."""
        return self._hidden_states(
            build_row([Part(adapter=None, sequences=sequences)], self.model.device)
        )

    def backward(
        self, trials: list[TrialState], parts: list[Part] | None = None
    ) -> tuple[Row, torch.Tensor]:
        """Adds the gradient of each trial's next micro-batch to it; the row, and its tokens' losses [N]."""
        parts = [trial.next_part() for trial in trials] if parts is None else parts
        row = build_row(parts, self.model.device)
        row.dropout_seeds = {
            trial.adapter.name: trial.dropout_seed()
            for trial in trials
            if trial.config.lora_dropout > 0
        }
        recomputes = any(trial.config.gradient_checkpointing for trial in trials)
        with current(row), _recomputing(self.model) if recomputes else contextlib.nullcontext():
            hidden_ND = self._hidden_states(row)[row.predict_N]
            loss, loss_N = weighted_loss(self.model, hidden_ND, row.target_N, row.weight_N)
            loss.backward()
        self.lora.add_grads(row)
        return row, loss_N

    def _hidden_states(self, row: Row) -> torch.Tensor:
        """The backbone's last hidden states, [T, D]."""
        backbone: Any = self.model.base_model
        self.lora.prepare(row)
        with current(row):
            output = backbone(
                input_ids=row.ids_T[None], position_ids=row.positions_T[None], use_cache=False
            )
        return output.last_hidden_state[0]

    def _check_exact(self, expected: list[torch.Tensor]) -> None:
        """Compares a packed pass with each sequence alone, before anything is trained on it.

        A fast path of attention that fails is switched off by name, and the generic one is tried.
        """
        if self._is_exact(expected):
            return
        fast = attention.FAST_PATHS - attention.disabled
        attention.disabled.update(fast)
        if self._is_exact(expected):
            warnings.warn(
                f"attention's fast paths ({', '.join(sorted(fast))}) are not exact on "
                f"{self.model.device}: going on with the generic one",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        attention.disabled.difference_update(fast)
        raise ModelError(
            f"{type(self.model).__name__} gives other results for a packed row than for its sequences "
            "alone (a layer of a kind that the packed engine does not know): use --engine trl"
        )

    def _check_grouped_products(self) -> None:
        """Switches grouped LoRA products off where they would be taken and are wrong on this machine."""
        device, dtype = self.model.device, self.model.dtype
        if not self.lora.is_grouped:
            return
        shapes = {
            (group.layers[0].in_features, *(layer.out_features for layer in group.layers))
            for group in self.lora.groups
        }
        for features, *outputs in sorted(shapes):
            fault = grouped_lora.find_fault(features, outputs, device, dtype)
            if fault is not None:
                grouped_lora.disabled.add(grouped_lora.NAME)
                warnings.warn(
                    f"grouped LoRA products ({grouped_lora.NAME}) are not exact on {device} ({fault}): "
                    "going on with sliced ones",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return

    def _is_exact(self, expected: list[torch.Tensor]) -> bool:
        sequences = _check_sequences(self.model)
        row = build_row([Part(adapter=None, sequences=sequences)], self.model.device)
        hidden_TD = self._hidden_states(row)
        layers = self.model.config.get_text_config().num_hidden_layers
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        shared = row.pieces[0].end
        own = [hidden_TD[piece.start : piece.end] for piece in row.pieces[1:]]
        return row.attention_calls == layers and all(
            torch.allclose(
                ours, alone[shared:], rtol=tolerance, atol=tolerance * float(alone.abs().max())
            )
            for ours, alone in zip(own, expected, strict=True)
        )


@contextlib.contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Keeps each layer's input only, and computes the rest again in the backward pass.

    Transformers does so in training mode alone; nothing else depends on it, since what drops
    activations is refused.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.activation_checkpointing_disable()


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


def _adapted_layers(config: TrialConfig) -> tuple[bool, list[str]]:
    return config.lora_dropout > 0, sorted(config.lora_target_modules)


def check_model(model: PreTrainedModel) -> None:
    """Refuses what a row of several trials cannot represent.

    Raises:
        ModelError: the model drops activations while it trains, or lacks a language-model head.
    """
    name = type(model).__name__
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise ModelError(
                f"{name}: {path} drops activations (p = {module.p}), which the packed engine does not: "
                "use --engine trl"
            )
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no language-model head")


def _check_sequences(model: PreTrainedModel) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two sequences of different length with a common beginning."""
    generator = np.random.default_rng(0)
    vocabulary = model.config.get_text_config().vocab_size
    prefix = generator.integers(0, vocabulary, 5)
    sequences = []
    for length in (9, 14):
        tokens = np.concatenate([prefix, generator.integers(0, vocabulary, length)])
        labels = np.where(np.arange(len(tokens)) < len(prefix) + 1, -100, tokens)
        tokens[len(prefix)] = length  # so that they part where the prefix ends
        sequences.append((tokens, labels))
    return sequences


@torch.no_grad()
def _hidden_states_alone(model: PreTrainedModel) -> list[torch.Tensor]:
    backbone: Any = model.base_model
    return [
        backbone(
            input_ids=torch.from_numpy(tokens)[None].to(model.device), use_cache=False
        ).last_hidden_state[0]
        for tokens, _ in _check_sequences(model)
    ]


def _sum_by(sequence_N: np.ndarray, value_N: torch.Tensor, num: int) -> np.ndarray:
    return np.bincount(sequence_N, weights=value_N.cpu().numpy(), minlength=num)


def _num_fitting(lengths: np.ndarray, num_tokens: int) -> int:
    """How many of the first examples a row of at most `num_tokens` holds; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(lengths), num_tokens, side="right")))
