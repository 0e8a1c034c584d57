"""A GGUF opened by llama.cpp's low-level interface: metadata, tokens, held-out losses, greedy text.

`open_gguf(path)` -> `GgufModel`. What llama.cpp prints is kept off the terminal; a failure is a
ModelError with the file's name.
"""

import contextlib
import ctypes
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pandas as pd

from deploy.decoder import FLASH_ATTENTION_OFF, Decoder, open_decoder
from deploy.llama_cpp_wheel import num_cores
from training.exceptions import ModelError

NOT_SUPERVISED = -100
GGML_LOG_LEVEL_ERROR = 4
MOST_DECODERS = 8
"""Contexts that score examples at the same time: each holds logits of its own."""

LookAtExample = Callable[[str, int, np.ndarray], None]


@dataclass(frozen=True)
class Speed:
    """Tokens a second, measured with the threads that chat uses."""

    prompt: float
    generation: float
    num_threads: int


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
        # One core is left to others: what waits at each of its thousand operations for a thread whose
        # core is taken writes a token in seconds.
        with open_decoder(llama_cpp, path, model, num_ctx, max(1, threads - 1)) as decoder:
            vocab = llama_cpp.llama_model_get_vocab(model)
            yield GgufModel(llama_cpp, path, model, vocab, decoder, num_ctx, threads)
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
    vocab: Any
    decoder: Decoder
    num_ctx: int
    num_threads: int

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

    def example_losses(
        self, examples: Iterable[Mapping[str, Any]], look: LookAtExample | None = None
    ) -> pd.DataFrame:
        """Per-example losses: `example_id`, `loss_sum` (nats over supervised tokens), `num_tokens`.

        Every core scores examples of its own: threads of one context would wait for each other, as
        above. What all examples begin with is computed once.

        Args:
            examples: with `example_id`, `input_ids`, `labels`.
            look: gets the example's id, and what `deploy.decoder.Look` gets; from several threads.
        """
        rows = [_Row.of(example) for example in examples]
        prefix = _shared_prefix(rows)
        free: SimpleQueue[Decoder] = SimpleQueue()
        with contextlib.ExitStack() as stack:
            for decoder in self._scorers(stack, len(rows)):
                decoder.keep_prefix(prefix)
                free.put(decoder)

            def score(row: _Row) -> float:
                decoder = free.get()
                try:
                    at_row = functools.partial(look, row.example_id) if look else None
                    return decoder.loss_sum(row.input_ids, row.targets, row.supervised, at_row)
                finally:
                    free.put(decoder)

            # Longest first: the others fill what is left at the end.
            order = sorted(range(len(rows)), key=lambda n: -len(rows[n].input_ids))
            pool = stack.enter_context(ThreadPoolExecutor(max(1, free.qsize())))
            losses = pool.map(score, [rows[n] for n in order])
            by_row = dict(zip(order, losses, strict=True))
        return pd.DataFrame(
            [(row.example_id, by_row[n], int(row.supervised.sum())) for n, row in enumerate(rows)],
            columns=["example_id", "loss_sum", "num_tokens"],
        )

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Most likely continuation, with the end token if one was reached."""
        tokens: list[int] = []
        for token in self.decoder.next_tokens(prompt):
            tokens.append(token)
            if self.is_end(token) or len(tokens) == max_tokens:
                break
        return tokens

    def speed(self, prompt: Sequence[int], num_tokens: int, limit_s: float) -> Speed:
        """How fast a prompt is read, and an answer of `num_tokens` written, or what `limit_s` allow.

        The answer goes on past its end token: what it says is no matter here.
        """
        with open_decoder(
            self.llama_cpp, self.path, self.model, self.num_ctx, self.num_threads
        ) as decoder:
            next(decoder.next_tokens(prompt[:1]))  # the weights come from the disk once
            start = time.perf_counter()
            answer = decoder.next_tokens(prompt)
            next(answer)
            read = time.perf_counter()
            num_written, passed = 0, 0.0
            while num_written < num_tokens and passed < limit_s:
                next(answer)
                num_written, passed = num_written + 1, time.perf_counter() - read
        return Speed(len(prompt) / (read - start), num_written / passed, self.num_threads)

    def _scorers(self, stack: contextlib.ExitStack, num_rows: int) -> list[Decoder]:
        """Decoders that share the cores."""
        # A GPU is one device, however many ask it.
        most = 1 if self.llama_cpp.llama_supports_gpu_offload() else MOST_DECODERS
        count = min(self.num_threads, most, num_rows)
        return [
            stack.enter_context(
                open_decoder(
                    self.llama_cpp,
                    self.path,
                    self.model,
                    self.num_ctx,
                    self.num_threads // count,
                    FLASH_ATTENTION_OFF,
                )
            )
            for _ in range(count)
        ]

    def _token_text(self, token: int) -> str:
        if token < 0:
            return ""
        return self.llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8")


@dataclass(frozen=True)
class _Row:
    """One example, up to the last token that has a supervised successor."""

    example_id: str
    input_ids: np.ndarray
    targets: np.ndarray
    """The token after each."""
    supervised: np.ndarray

    @classmethod
    def of(cls, example: Mapping[str, Any]) -> "_Row":
        ids = np.asarray(example["input_ids"], np.int64)
        targets = np.asarray(example["labels"], np.int64)[1:]
        supervised = targets != NOT_SUPERVISED
        end = int(supervised.nonzero()[0][-1]) + 1 if supervised.any() else 0
        return cls(example["example_id"], ids[:end], targets[:end], supervised[:end])


def _shared_prefix(rows: Sequence[_Row]) -> np.ndarray:
    """What all rows begin with, as far as nothing in it is supervised."""
    scored = [row for row in rows if len(row.input_ids)]
    if len(scored) < 2:
        return np.zeros(0, np.int64)
    length = min(int(row.supervised.argmax()) for row in scored)
    heads = np.stack([row.input_ids[:length] for row in scored])
    differs = (heads != heads[0]).any(axis=0)
    return heads[0][: int(differs.argmax()) if differs.any() else length]
