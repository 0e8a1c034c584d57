"""Every way of attention against the generic one, and that against each sequence alone."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training import attention
from training.attention import packed_attention, variable_length_arguments
from training.exceptions import ModelError
from training.row import Part, Row, build_row, current, shared_prefix


def make_row(lengths: list[int], prefix: int = 0) -> Row:
    """Sequences that share `prefix` tokens and no more."""
    sequences = []
    for number, length in enumerate(lengths):
        tokens = np.concatenate([np.arange(prefix), np.full(length, 100 + number)])
        sequences.append((tokens, np.where(np.arange(len(tokens)) <= prefix, -100, tokens)))
    return build_row([Part(adapter=None, sequences=sequences)], torch.device("cpu"))


def make_inputs(row: Row, heads: int = 6, key_heads: int = 2) -> tuple[torch.Tensor, ...]:
    """Query, key and value as a model's projections give them: views of [T, heads · E]."""
    torch.manual_seed(0)
    return tuple(
        torch.randn(1, len(row), number * 8).view(1, len(row), number, 8).transpose(1, 2)
        for number in (heads, key_heads, key_heads)
    )


def attend(row: Row, inputs: tuple[torch.Tensor, ...], **options: Any) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of query, key and value."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with current(row):
        output, _ = packed_attention(
            nn.Identity(), leaves[0], leaves[1], leaves[2], None, **options
        )
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator))
    return output.detach(), *(leaf.grad for leaf in leaves)  # pyright: ignore[reportReturnType]


def reference(
    row: Row, inputs: tuple[torch.Tensor, ...], window: int | None, softcap: float | None
) -> torch.Tensor:
    """The textbook's formula over the whole row, with one mask of who sees whom."""
    query, key, value = (tensor.detach() for tensor in inputs)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    sees = torch.zeros(len(row), len(row), dtype=torch.bool)
    for piece in row.pieces:
        for q in range(piece.start, piece.end):
            keys = [*range(piece.prefix_start, piece.prefix_end), *range(piece.start, q + 1)]
            sees[q, keys[-window:] if window else keys] = True
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("prefix", [0, 5])
def test_attention_equals_the_formula(
    window: int | None, softcap: float | None, prefix: int
) -> None:
    row = make_row([3, 9, 1, 6], prefix)
    inputs = make_inputs(row)
    output, *_ = attend(row, inputs, sliding_window=window, softcap=softcap)
    torch.testing.assert_close(output, reference(row, inputs, window, softcap))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    prefix=st.integers(0, 6),
    window=st.none() | st.integers(1, 9),
)
def test_the_explicit_way_equals_the_generic_one(
    lengths: list[int], prefix: int, window: int | None
) -> None:
    row = make_row(lengths, prefix)
    inputs = make_inputs(row)
    fast = attend(row, inputs, sliding_window=window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "disabled", set(attention.FAST_PATHS))
        slow = attend(row, inputs, sliding_window=window)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stands in for torch's CUDA kernel: its signature, its checks, its alignment of the last tokens."""
    assert query.dim() == key.dim() == 3
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[0] == cu_seq_k[0] == 0
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for index in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[index] : cu_seq_q[index + 1]].transpose(0, 1)
        keys = slice(int(cu_seq_k[index]), int(cu_seq_k[index + 1]))
        k, v = (t[keys].repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
        assert q.shape[1] <= max_q and k.shape[1] <= max_k
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(
            k.shape[1]
        )
        sees = distance >= 0
        if window_size[0] >= 0:
            sees &= distance <= window_size[0]
        scores = (q @ k.transpose(1, 2) * (scale or 1)).masked_fill(~sees, -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4])
def test_the_cuda_kernel_gets_arguments_that_mean_the_same(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = make_row([3, 9, 1, 6], prefix=5)
    inputs = make_inputs(row)
    expected = attend(row, inputs, sliding_window=window)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_choose", lambda *_: "variable_length")
    found = attend(row, inputs, sliding_window=window)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_stand_in_has_the_kernels_parameters() -> None:
    import inspect

    from torch.nn.attention import varlen

    kernel = inspect.signature(varlen.varlen_attn).parameters
    for name, parameter in inspect.signature(varlen_attn).parameters.items():
        assert kernel[name].kind == parameter.kind


@pytest.mark.gpu
def test_the_cuda_kernel_equals_the_generic_way() -> None:
    row = make_row([30, 90, 1, 60], prefix=20)
    inputs = tuple(t.to("cuda", torch.bfloat16) for t in make_inputs(row))
    fast = attend(row, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "disabled", set(attention.FAST_PATHS))
        slow = attend(row, inputs)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def test_arguments_of_the_kernel_are_made_once_a_row() -> None:
    row = make_row([2, 3], prefix=2)
    arguments = variable_length_arguments(row.pieces, torch.device("cpu"))
    assert arguments["cu_seq_q"].tolist() == [0, 2, 4, 7]
    assert arguments["cu_seq_k"].tolist() == [0, 2, 6, 11]
    assert arguments["gather_M"].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert (arguments["max_q"], arguments["max_k"]) == (3, 5)


def test_what_attention_does_not_know_is_refused_by_name() -> None:
    row = make_row([3])
    inputs = make_inputs(row)
    with pytest.raises(ModelError, match="gives attention its s_aux"):
        attend(row, inputs, s_aux=torch.zeros(6))
    with pytest.raises(ModelError, match=r"attention_dropout 0\.1"):
        attend(row, inputs, dropout=0.1)


def test_a_shared_prefix_ends_before_the_first_supervised_prediction() -> None:
    tokens = np.array([5, 6, 7, 8, 9])
    late = (tokens, np.array([-100, -100, -100, 8, 9]))
    early = (tokens, np.array([-100, -100, 7, 8, 9]))
    other = (np.array([5, 6, 0, 8]), np.array([-100, -100, -100, 8]))
    assert shared_prefix([late, late]) == 2  # place 2 predicts token 3, which is supervised
    assert shared_prefix([late, early]) == 1
    assert shared_prefix([late, other]) == 2
    assert shared_prefix([late]) == 0


def test_a_row_counts_the_tokens_it_saves() -> None:
    assert len(make_row([3, 9, 1, 6], prefix=5)) == 5 + 3 + 9 + 1 + 6
