"""A GGUF opened by llama.cpp's low-level interface: metadata, tokens, held-out losses, greedy text.

`open_gguf(path)` -> `GgufModel`. What llama.cpp prints is kept off the terminal; a failure is a
ModelError with the file's name.
"""

import contextlib
import ctypes
import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deploy.llama_cpp_wheel import num_cores
from training.exceptions import ModelError

NOT_SUPERVISED = -100
GGML_LOG_LEVEL_ERROR = 4
BATCH_TOKENS = 256
"""Tokens decoded at once; bounds the logits that are held (256 x vocabulary x 4 bytes)."""


def load_llama_cpp() -> Any:
    """The `llama_cpp` package, with its log off the terminal; errors are kept for `last_error`.

    Raises:
        ModelError: it is not installed, or its compiled library cannot be loaded.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ModelError(
            f"llama_cpp cannot be loaded ({cause}); `make setup` installs it"
        ) from error
    llama_cpp.llama_log_set(_log_callback(), ctypes.c_void_p(0))
    return llama_cpp


def last_error() -> str:
    """What llama.cpp logged last as errors, in parentheses; empty if there was nothing."""
    return f" ({'; '.join(_errors)})" if _errors else ""


def render_chat(template: str, bos: str, eos: str, messages: list[dict[str, str]]) -> str:
    """A chat's prompt as llama_cpp renders a GGUF's template, which writes its own BOS if any."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(template=template, bos_token=bos, eos_token=eos)
    rendered = formatter(messages=messages)  # pyright: ignore[reportArgumentType]
    # A second BOS would come from here (llama-cpp-python#1501).
    assert rendered.added_special, "llama_cpp adds no BOS to a rendered template"
    return rendered.prompt


@contextlib.contextmanager
def open_gguf(path: Path, num_ctx: int, num_threads: int | None = None) -> Iterator["GgufModel"]:
    """Loads a GGUF with a context of `num_ctx` tokens; frees it afterwards.

    Raises:
        ModelError: the file is missing, or llama.cpp cannot load it.
    """
    llama_cpp = load_llama_cpp()
    if not path.is_file():
        raise ModelError(f"{path} is not a file, but must be a GGUF")
    threads = num_threads or num_cores()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        os.fsencode(path), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise ModelError(f"{path}: llama.cpp cannot load this file as a GGUF model{last_error()}")
    try:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = num_ctx, BATCH_TOKENS, BATCH_TOKENS
        params.n_threads = params.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise ModelError(f"{path}: llama.cpp cannot make a context of {num_ctx} tokens")
        try:
            vocab = llama_cpp.llama_model_get_vocab(model)
            yield GgufModel(llama_cpp, path, model, context, vocab)
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)


_errors: deque[str] = deque(maxlen=2)


@functools.cache
def _log_callback() -> Any:
    # Cached, since llama.cpp calls it for as long as the process lives.
    from llama_cpp import llama_log_callback

    @llama_log_callback
    def keep_errors(level: int, text: bytes, user_data: Any) -> None:
        if level == GGML_LOG_LEVEL_ERROR:
            _errors.append(text.decode("utf-8", "replace").strip())

    return keep_errors


@dataclass(frozen=True)
class GgufModel:
    """A loaded GGUF; valid inside `open_gguf` only."""

    llama_cpp: Any
    path: Path
    model: Any
    context: Any
    vocab: Any

    @property
    def num_vocab(self) -> int:
        return self.llama_cpp.llama_vocab_n_tokens(self.vocab)

    @property
    def num_params(self) -> int:
        return self.llama_cpp.llama_model_n_params(self.model)

    @property
    def num_ctx_train(self) -> int:
        """Longest sequence that the model was made for."""
        return self.llama_cpp.llama_model_n_ctx_train(self.model)

    @property
    def bos_token_id(self) -> int:
        return self.llama_cpp.llama_vocab_bos(self.vocab)

    @property
    def eos_token_id(self) -> int:
        return self.llama_cpp.llama_vocab_eos(self.vocab)

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp puts a BOS in front of plain text by itself."""
        return bool(self.llama_cpp.llama_vocab_get_add_bos(self.vocab))

    def is_end(self, token: int) -> bool:
        """Whether llama.cpp ends a generation at this token."""
        return bool(self.llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def metadata(self, key: str) -> str | None:
        """A text of the file's metadata, whole."""
        read = self.llama_cpp.llama_model_meta_val_str
        length = read(self.model, key.encode(), ctypes.create_string_buffer(1), 1)
        if length < 0:
            return None
        buffer = ctypes.create_string_buffer(length + 1)
        read(self.model, key.encode(), buffer, length + 1)
        return buffer.raw[:length].decode("utf-8")

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Token ids; special tokens in the text are recognised, as Transformers does."""
        content = text.encode("utf-8")
        size = len(content) + 8
        tokens = (self.llama_cpp.llama_token * size)()
        count = self.llama_cpp.llama_tokenize(
            self.vocab, content, len(content), tokens, size, add_special, True
        )
        if count < 0:
            raise ModelError(f"{self.path}: llama.cpp cannot tokenise {text[:40]!r}")
        return tokens[:count]

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of a chat's prompt as llama_cpp's `create_chat_completion` makes them."""
        template = self.metadata("tokenizer.chat_template") or ""
        bos, eos = self._token_text(self.bos_token_id), self._token_text(self.eos_token_id)
        return self.tokenize(render_chat(template, bos, eos, messages), add_special=False)

    def example_losses(self, examples: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
        """Per-example losses: `example_id`, `loss_sum` (nats over supervised tokens), `num_tokens`."""
        rows = []
        for example in examples:
            ids = np.asarray(example["input_ids"], np.int64)
            labels = np.asarray(example["labels"], np.int64)[1:]
            supervised = labels != NOT_SUPERVISED
            loss = self._loss_sum(ids[:-1], labels, supervised)
            rows.append((example["example_id"], loss, int(supervised.sum())))
        return pd.DataFrame(rows, columns=["example_id", "loss_sum", "num_tokens"])

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Most likely continuation, with the end token if one was reached."""
        self._forget()
        logits = self._decode(prompt, 0, [False] * (len(prompt) - 1) + [True])
        tokens: list[int] = []
        while True:
            tokens.append(int(logits[-1].argmax()))
            if self.is_end(tokens[-1]) or len(tokens) == max_tokens:
                return tokens
            logits = self._decode(tokens[-1:], len(prompt) + len(tokens) - 1, [True])

    def _token_text(self, token: int) -> str:
        if token < 0:
            return ""
        return self.llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8")

    def _loss_sum(self, input_ids: np.ndarray, labels: np.ndarray, supervised: np.ndarray) -> float:
        self._forget()
        loss = 0.0
        for start in range(0, len(input_ids), BATCH_TOKENS):
            part = slice(start, start + BATCH_TOKENS)
            logits_SV = self._decode(input_ids[part], start, supervised[part])
            wanted = labels[part][supervised[part]]
            peak = logits_SV.max(axis=1, keepdims=True, initial=-np.inf)
            total = np.exp(logits_SV - peak).sum(axis=1, dtype=np.float64)
            chosen = np.take_along_axis(logits_SV, wanted[:, None], axis=1)
            loss += float((np.log(total) + (peak - chosen)[:, 0]).sum())
        return loss

    def _forget(self) -> None:
        memory = self.llama_cpp.llama_get_memory(self.context)
        self.llama_cpp.llama_memory_clear(memory, True)

    def _decode(self, tokens: Sequence[int] | np.ndarray, position: int, wanted: Any) -> np.ndarray:
        """Logits after those tokens that are `wanted`, one row each; a copy."""
        rows = []
        for start in range(0, len(tokens), BATCH_TOKENS):
            part = slice(start, start + BATCH_TOKENS)
            rows.append(self._decode_batch(tokens[part], position + start, wanted[part]))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _decode_batch(self, tokens: Any, position: int, wanted: Any) -> np.ndarray:
        num_tokens = len(tokens)
        batch = self.llama_cpp.llama_batch_init(num_tokens, 0, 1)
        try:
            batch.n_tokens = num_tokens
            for index in range(num_tokens):
                batch.token[index] = int(tokens[index])
                batch.pos[index] = position + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
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
        return np.ctypeslib.as_array(logits, shape=(num_rows, self.num_vocab)).copy()
