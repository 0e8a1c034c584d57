"""Causal attention per sequence of a flat token row, through Transformers' own attention interface.

`use_packed_attention(model)` makes a model call `packed_attention`, which looks at the current row's pieces
(`training.row`) instead of a mask. Three exact ways, chosen by what a call asks for:
`_variable_length` on a CUDA GPU in half precision (torch's flash attention), `_explicit` for short pieces
(one pair of batched products a piece), `_generic` for everything else (long pieces, soft-caps).

H query heads, G query heads a key head, J key heads, T tokens of the row, Q of a piece, M keys, E head size.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from training.exceptions import ModelError
from training.row import Piece, Row, current_row

NAME = "loraloom_packed"
SHORT = 192
"""Longest piece whose attention weights are kept for the backward pass; measured, see docs/performance.md."""

FAST_PATHS = {"explicit", "variable_length"}

disabled: set[str] = set()
"""Fast paths that have failed the engine's check on this machine."""


@contextmanager
def packed_attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Lets `model` attend piece by piece inside the context.

    Raises:
        ModelError: the model does not use Transformers' attention interface.
    """
    before = model.config._attn_implementation or "eager"
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"{type(model).__name__} does not use Transformers' attention interface, which the packed "
            "engine needs: use --engine trl"
        ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every piece of the current row.

    Args:
        module: the attention layer, for its name only.
        query: [1, H, T, E]
        key: [1, J, T, E]
        value: [1, J, T, E]
        scaling: of the products; None is 1 / sqrt(E).
        dropout: of the weights; must be 0.
        sliding_window: keys that a query sees, itself among them.
        softcap: bound of the scores, as in Gemma 2.

    Returns:
        [1, T, H, E], and None for the weights.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ModelError(
                f"{type(module).__name__} gives attention its {name}, which the packed engine does "
                "not know: use --engine trl"
            )
    if dropout:
        raise ModelError(
            f"{type(module).__name__} drops attention weights (attention_dropout {dropout}), which "
            "the packed engine does not: use --engine trl"
        )
    row = current_row()
    row.attention_calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    way = _choose(query, row, softcap)
    if way == "variable_length":
        return _variable_length(query, key, value, row, scale, sliding_window), None
    if way == "explicit":
        out_THE = _Explicit.apply(query[0], key[0], value[0], row.pieces, scale, sliding_window)
        return out_THE[None], None
    return _generic(query, key, value, row.pieces, scale, sliding_window, softcap), None


AttentionInterface.register(NAME, packed_attention)


def _choose(query: torch.Tensor, row: Row, softcap: float | None) -> str:
    if softcap is not None:
        return "generic"
    if query.dtype != torch.float32:
        return "variable_length" if _has_flash(query.device) else "generic"
    longest = max(piece.end - piece.start for piece in row.pieces)
    return "explicit" if longest <= SHORT and "explicit" not in disabled else "generic"


def _has_flash(device: torch.device) -> bool:
    """Flash attention needs an Ampere GPU or a newer one."""
    return (
        device.type == "cuda"
        and "variable_length" not in disabled
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class _Explicit(torch.autograd.Function):
    """softmax(q kᵀ) v with the weights kept, one piece after the other, written into one output.

    As one node of the graph: a slice's own backward would fill a row of zeros for every piece.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_HTE: torch.Tensor,
        key_JTE: torch.Tensor,
        value_JTE: torch.Tensor,
        pieces: list[Piece],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        heads, length, _ = query_HTE.shape
        groups = heads // key_JTE.shape[0]
        out_THE = query_HTE.new_empty(length, heads, value_JTE.shape[-1])
        weights = []
        for piece in pieces:
            q = _queries(query_HTE, piece, groups)
            k, v = _keys(key_JTE, piece), _keys(value_JTE, piece)
            mask = _causal_mask(q.shape[1] // groups, k.shape[1], groups, window, q.dtype, q.device)
            w = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
            w = torch.softmax(w, -1)
            out_JGQE = torch.bmm(w, v).unflatten(1, (groups, -1))
            out_THE[piece.start : piece.end] = out_JGQE.flatten(0, 1).transpose(0, 1)
            weights.append(w)
        ctx.save_for_backward(query_HTE, key_JTE, value_JTE, *weights)
        ctx.pieces, ctx.scale, ctx.groups = pieces, scale, groups
        return out_THE

    @staticmethod
    def backward(ctx: Any, grad_THE: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, *weights = ctx.saved_tensors
        groups = ctx.groups
        # In the row's own memory order, which is that of the projections.
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key)
        grad_value = torch.zeros_like(value)
        grad_HTE = grad_THE.transpose(0, 1)
        for piece, w in zip(ctx.pieces, weights, strict=True):
            g = _queries(grad_HTE, piece, groups)
            q = _queries(query, piece, groups)
            k, v = _keys(key, piece), _keys(value, piece)
            _add_keys(grad_value, piece, torch.bmm(w.transpose(1, 2), g))
            scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(g, v.transpose(1, 2)), w, -1, w.dtype
            ).mul_(ctx.scale)
            grad_q = torch.bmm(scores, k).unflatten(1, (groups, -1)).flatten(0, 1)
            grad_query[:, piece.start : piece.end] = grad_q
            _add_keys(grad_key, piece, torch.bmm(scores.transpose(1, 2), q))
        return grad_query, grad_key, grad_value, None, None, None


def _queries(tensor_HTE: torch.Tensor, piece: Piece, groups: int) -> torch.Tensor:
    """[J, G·Q, E]: all query heads of a key head below one another, so that keys are not repeated."""
    return tensor_HTE[:, piece.start : piece.end].unflatten(0, (-1, groups)).flatten(1, 2)


def _keys(tensor_JTE: torch.Tensor, piece: Piece) -> torch.Tensor:
    """[J, M, E]: the prefix, then the piece itself."""
    own = tensor_JTE[:, piece.start : piece.end]
    if piece.prefix_end == piece.prefix_start:
        return own
    return torch.cat([tensor_JTE[:, piece.prefix_start : piece.prefix_end], own], 1)


def _add_keys(total_JTE: torch.Tensor, piece: Piece, grad_JME: torch.Tensor) -> None:
    prefix = piece.prefix_end - piece.prefix_start
    total_JTE[:, piece.start : piece.end] += grad_JME[:, prefix:]
    if prefix:
        total_JTE[:, piece.prefix_start : piece.prefix_end] += grad_JME[:, :prefix]


@functools.lru_cache(maxsize=512)
def _causal_mask(
    queries: int,
    keys: int,
    groups: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """[G·Q, M]: 0 where a query sees a key, else -inf; the last query is at the last key."""
    return _mask(queries, keys, window, dtype, device).repeat(groups, 1)


def _mask(
    queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    position_Q1 = torch.arange(keys - queries, keys, device=device)[:, None]
    key_M = torch.arange(keys, device=device)
    hidden = key_M > position_Q1
    if window is not None:
        hidden |= key_M <= position_Q1 - window
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


def _generic(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pieces: list[Piece],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Torch's own operations on each piece, differentiated by torch; the others' reference in the tests."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for piece in pieces:
        q = query[:, :, piece.start : piece.end]
        k, v = (
            _keys(tensor[0], piece).repeat_interleave(groups, 0)[None] for tensor in (key, value)
        )
        length, num_keys = q.shape[2], k.shape[2]
        if softcap is not None:
            scores = q @ k.transpose(2, 3) * scale
            scores = torch.tanh(scores / softcap) * softcap
            scores = scores + _mask(length, num_keys, window, q.dtype, q.device)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
            out = weights @ v
        elif length == num_keys and (window is None or window >= length):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            mask = _mask(length, num_keys, window, q.dtype, q.device)
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1)


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row: Row,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Torch's variable-length flash attention, with each piece's keys gathered behind its prefix."""
    from torch.nn.attention.varlen import varlen_attn

    if row.variable_length is None:  # the same in every layer
        row.variable_length = variable_length_arguments(row.pieces, query.device)
    arguments = dict(row.variable_length)
    gather_M = arguments.pop("gather_M")
    key_MJE, value_MJE = (tensor[0].transpose(0, 1)[gather_M] for tensor in (key, value))
    out_THE = varlen_attn(
        query[0].transpose(0, 1),
        key_MJE,
        value_MJE,
        **arguments,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out_THE, torch.Tensor)
    return out_THE[None]


def variable_length_arguments(pieces: list[Piece], device: torch.device) -> dict[str, Any]:
    """Cumulative lengths of the pieces' queries and keys (int32, from 0), and where each key stands."""
    cu_seq_q, cu_seq_k, gather, num_keys = [0], [0], [], []
    for piece in pieces:
        gather.append(torch.arange(piece.prefix_start, piece.prefix_end))
        gather.append(torch.arange(piece.start, piece.end))
        num_keys.append(len(gather[-2]) + len(gather[-1]))
        cu_seq_q.append(piece.end)
        cu_seq_k.append(cu_seq_k[-1] + num_keys[-1])
    return {
        "gather_M": torch.cat(gather).to(device),
        "cu_seq_q": torch.tensor(cu_seq_q, dtype=torch.int32, device=device),
        "cu_seq_k": torch.tensor(cu_seq_k, dtype=torch.int32, device=device),
        "max_q": max(piece.end - piece.start for piece in pieces),
        "max_k": max(num_keys),
    }
