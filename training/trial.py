"""All that one trial is while it trains: adapter, moments, step, and where it is in its data.

Data order and dropout are functions of the seed and the step, so that a step number, the weights and AdamW's
two moments are the whole state: `training.checkpoint` saves just these.
"""

import hashlib
from dataclasses import dataclass, field

import torch

from training.config import TrialConfig
from training.examples import BatchOrder, Examples
from training.packed_lora import Adapter
from training.row import Part
from training.schedules import learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step of a trial gave."""

    step: int
    """Counted from 1."""
    train_loss: float
    """Mean over the step's supervised tokens, nats; not finite if the trial has diverged."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Tokens of the step's sequences."""


@dataclass(kw_only=True)
class TrialState:
    """One trial in a pack.

    Args:
        config: its settings.
        examples: the train split.
        adapter: its weights, which the optimizer changes.
    """

    config: TrialConfig
    examples: Examples
    adapter: Adapter
    step: int = 0
    """Optimizer steps done."""
    micro: int = 0
    """Micro-batches of the next step that are in the gradient already."""
    loss_sum: float = 0.0
    num_tokens: int = 0
    optimizer: torch.optim.AdamW = field(init=False)
    order: BatchOrder = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.optimizer = torch.optim.AdamW(
            [self.adapter.weights],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.order = BatchOrder(
            len(self.examples),
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
        )

    @property
    def is_done(self) -> bool:
        return self.step >= self.config.max_steps

    def next_part(self) -> Part:
        """The next micro-batch; every token's weight is one share of the whole step's tokens."""
        batches = self.order.micro_batches(self.step)
        num_supervised = sum(int(self.examples.num_supervised[batch].sum()) for batch in batches)
        return Part(
            adapter=self.adapter.name,
            sequences=[self.examples[index] for index in batches[self.micro]],
            weight=1 / num_supervised,
            shares_prefix=self.config.lora_dropout == 0,
        )

    def dropout_seed(self) -> int:
        """Seed of the next micro-batch's dropout masks."""
        text = f"{self.config.seed} {self.step} {self.micro}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())

    def took(self, loss_sum: float, num_tokens: int) -> bool:
        """Counts a micro-batch whose gradient is in; whether it was the step's last."""
        self.micro += 1
        self.loss_sum += loss_sum
        self.num_tokens += num_tokens
        return self.micro == len(self.order.micro_batches(self.step))

    def update(self, grad_norm: float) -> StepResult:
        """Clips the step's gradient, whose norm this is, and changes the weights by it."""
        rate = learning_rate(self.config, self.step)
        self.optimizer.param_groups[0]["lr"] = rate
        limit = self.config.max_grad_norm or float("inf")
        # As torch.nn.utils.clip_grads_with_norm_ has it; a norm that is not finite gives NaN, or zeros.
        factor = limit / (grad_norm + 1e-6)
        if not factor >= 1:
            self.adapter.gradient().mul_(factor)
        self.optimizer.step()
        result = StepResult(
            step=self.step + 1,
            train_loss=self.loss_sum,
            learning_rate=rate,
            grad_norm=grad_norm,
            num_tokens=self.num_tokens,
        )
        self.step += 1
        self.forget_step()
        return result

    def forget_step(self) -> None:
        """Back to the beginning of the next optimizer step."""
        self.adapter.gradient().zero_()
        self.micro, self.loss_sum, self.num_tokens = 0, 0.0, 0
