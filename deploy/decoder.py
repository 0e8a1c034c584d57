"""One context of llama.cpp: tokens in, losses of examples and greedy continuations out.

`open_decoder` makes it over a loaded model, which several contexts may share. Every sequence starts from
a prefix that is decoded once (`keep_prefix`): the system prompt that all examples begin with.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.exceptions import ModelError

BATCH_TOKENS = 256
"""Tokens decoded at once; bounds the logits that are held (256 x vocabulary x 4 bytes)."""
PREFIX, CURRENT = 0, 1
"""llama.cpp's numbers of the two sequences in a context."""
FLASH_ATTENTION_AUTO, FLASH_ATTENTION_OFF = -1, 0
"""llama.cpp's `llama_flash_attn_type`."""

Look = Callable[[int, np.ndarray], None]
"""Called with the number of a sequence's first supervised token in a batch, and the logits that predict
it and those after it, SxV in llama.cpp's buffer: good until it returns."""


@contextlib.contextmanager
def open_decoder(
    llama_cpp: Any,
    path: Path,
    model: Any,
    num_ctx: int,
    num_threads: int,
    flash_attention: int = FLASH_ATTENTION_AUTO,
) -> Iterator["Decoder"]:
    """A context of `num_ctx` tokens over `model`, which was loaded from `path`; freed afterwards.

    Args:
        llama_cpp: the package.
        path: the model's file, for errors.
        model: the loaded model.
        num_ctx: tokens of a sequence at most.
        num_threads: to decode with.
        flash_attention: off for scores. On the CPU it sums in float16 where a batch has fewer than 64
            tokens and in float32 where it has more, so a loss would depend on where batches end, and be
            farther from Transformers' (2e-5 of it, for 3e-6 without, at the same speed).

    Raises:
        ModelError: llama.cpp cannot make it.
    """
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = num_ctx, BATCH_TOKENS, BATCH_TOKENS
    params.n_threads = params.n_threads_batch = num_threads
    params.flash_attn_type = flash_attention
    # Both sequences in one memory, so that they can share the prefix and each may be as long as it.
    params.n_seq_max, params.kv_unified = 2, True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise ModelError(f"{path}: llama.cpp cannot make a context of {num_ctx} tokens")
    try:
        vocab = llama_cpp.llama_model_get_vocab(model)
        yield Decoder(llama_cpp, path, context, llama_cpp.llama_vocab_n_tokens(vocab))
    finally:
        llama_cpp.llama_free(context)


@dataclass
class Decoder:
    """A context; valid inside `open_decoder`, and in one thread at a time."""

    llama_cpp: Any
    path: Path
    context: Any
    num_vocab: int
    prefix_length: int = 0

    def keep_prefix(self, tokens: np.ndarray) -> None:
        """What every sequence from now on begins with."""
        self.llama_cpp.llama_memory_clear(self._memory(), True)
        self.prefix_length = len(tokens)
        for start in range(0, len(tokens), BATCH_TOKENS):
            part = tokens[start : start + BATCH_TOKENS]
            self._decode(part, start, np.zeros(len(part), bool), PREFIX)

    def loss_sum(
        self,
        input_ids: np.ndarray,
        targets: np.ndarray,
        supervised: np.ndarray,
        look: Look | None = None,
    ) -> float:
        """Nats over the supervised targets of one sequence, the kept prefix included in it."""
        self._start()
        loss, num_scored = 0.0, 0
        for start in range(self.prefix_length, len(input_ids), BATCH_TOKENS):
            part = slice(start, start + BATCH_TOKENS)
            logits_SV = self._decode(input_ids[part], start, supervised[part])
            if look is not None:
                look(num_scored, logits_SV)
            num_scored += len(logits_SV)
            wanted = targets[part][supervised[part]]
            chosen = np.take_along_axis(logits_SV, wanted[:, None], axis=1)
            peak = logits_SV.max(axis=1, keepdims=True, initial=-np.inf)
            # In llama.cpp's own buffer, since a copy of it takes longer than the exponentials.
            np.subtract(logits_SV, peak, out=logits_SV)
            total = np.exp(logits_SV, out=logits_SV).sum(axis=1, dtype=np.float64)
            loss += float((np.log(total) + (peak - chosen)[:, 0]).sum())
        return loss

    def next_tokens(self, prompt: Sequence[int]) -> Iterator[int]:
        """Most likely continuation of a prompt (after the kept prefix, if any), without end."""
        self._start()
        tokens, position = list(prompt), self.prefix_length
        while True:
            logits_SV = np.zeros((0, self.num_vocab), np.float32)
            for start in range(0, len(tokens), BATCH_TOKENS):
                part = np.asarray(tokens[start : start + BATCH_TOKENS])
                is_last = np.arange(start, start + len(part)) == len(tokens) - 1
                logits_SV = self._decode(part, position + start, is_last)
            position += len(tokens)
            tokens = [int(logits_SV[-1].argmax())]
            yield tokens[0]

    def _start(self) -> None:
        """A new sequence, which holds the prefix."""
        self.llama_cpp.llama_memory_seq_rm(self._memory(), CURRENT, -1, -1)
        if self.prefix_length:
            self.llama_cpp.llama_memory_seq_cp(self._memory(), PREFIX, CURRENT, -1, -1)

    def _memory(self) -> Any:
        return self.llama_cpp.llama_get_memory(self.context)

    def _decode(
        self, tokens: np.ndarray, position: int, wanted: np.ndarray, sequence: int = CURRENT
    ) -> np.ndarray:
        """Logits after those tokens that are `wanted`, one row each; good until the next call."""
        num_tokens = len(tokens)
        batch = self.llama_cpp.llama_batch_init(num_tokens, 0, 1)
        try:
            batch.n_tokens = num_tokens
            for index in range(num_tokens):
                batch.token[index] = int(tokens[index])
                batch.pos[index] = position + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = bool(wanted[index])
            status = self.llama_cpp.llama_decode(self.context, batch)
        finally:
            self.llama_cpp.llama_batch_free(batch)
        if status:
            raise ModelError(f"{self.path}: llama.cpp's decode failed with status {status}")
        num_rows = int(np.count_nonzero(wanted))
        if not num_rows:
            return np.zeros((0, self.num_vocab), np.float32)
        logits = self.llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, shape=(num_rows, self.num_vocab))
