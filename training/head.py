"""The language-model head at supervised positions only: each token's loss, and its gradient in the same pass.

Logits exist for a chunk of tokens at a time, so memory does not grow with tokens times vocabulary. The
gradient of the hidden states is computed where the loss is (as Liger's fused linear cross-entropy does),
since the head itself is frozen.

N supervised tokens, n of a chunk, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

MAX_LOGITS = 2**25
"""Most logits at a time: 128 MiB in float32."""


def output_logits(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] in float32 from the backbone's last hidden states, as the model's own forward."""
    head: Any = model.get_output_embeddings()
    config: Any = model.config.get_text_config()
    logits_NV = head(hidden_ND).float()
    scale, cap = _logit_scale(config), getattr(config, "final_logit_softcapping", None)
    if scale != 1:
        logits_NV = logits_NV * scale
    return logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap


def token_losses(
    model: PreTrainedModel, hidden_ND: torch.Tensor, target_N: torch.Tensor
) -> torch.Tensor:
    """Loss [N] of each token in nats, without gradient."""
    with torch.no_grad():
        return torch.cat(
            [
                functional.cross_entropy(output_logits(model, hidden), target, reduction="none")
                for hidden, target in _chunks(model, hidden_ND, target_N)
            ]
        )


def weighted_loss(
    model: PreTrainedModel, hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weight · loss, to differentiate, and each token's loss [N] without gradient."""
    return _WeightedLoss.apply(hidden_ND, model, target_N, weight_N)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        model: PreTrainedModel,
        target_N: torch.Tensor,
        weight_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, grads = [], []
        for hidden_nD, target_n, weight_n in _chunks(model, hidden_ND, target_N, weight_N):
            with torch.enable_grad():
                hidden_nD = hidden_nD.detach().requires_grad_()
                logits_nV = output_logits(model, hidden_nD)
            loss_n, slope_nV = _loss_and_slope(logits_nV.detach(), target_n)
            (grad_nD,) = torch.autograd.grad(logits_nV, hidden_nD, slope_nV)
            losses.append(loss_n)
            grads.append(grad_nD * weight_n[:, None].to(grad_nD.dtype))
        loss_N = torch.cat(losses)
        ctx.save_for_backward(torch.cat(grads))
        ctx.mark_non_differentiable(loss_N)
        return (loss_N * weight_N).sum(), loss_N

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad.to(grad_ND.dtype), None, None, None


def _loss_and_slope(
    logits_nV: torch.Tensor, target_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy [n] and its derivative by the logits [n, V]: one exponential for both.

    Cross entropy and its backward pass would compute the exponentials twice, in two tensors more.
    """
    target_n1 = target_n[:, None]
    probability_nV = torch.softmax(logits_nV, 1)
    # The largest probability is at least 1 / V, so its logarithm is never that of zero.
    log_sum_n1 = logits_nV.amax(1, keepdim=True) - probability_nV.amax(1, keepdim=True).log()
    loss_n = (log_sum_n1 - logits_nV.gather(1, target_n1))[:, 0]
    probability_nV.scatter_add_(1, target_n1, -torch.ones_like(log_sum_n1))
    return loss_n, probability_nV


def _chunks(model: PreTrainedModel, *tensors: torch.Tensor) -> Any:
    size = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _logit_scale(config: Any) -> float:
    """Factor between the head's output and the logits; 1 for most architectures."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides by it
        return 1 / float(config.logits_scaling)
    return 1.0
