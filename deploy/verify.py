"""Is this GGUF the model that was trained? Text in, tokens, template, end, and losses compared.

`verify_gguf` compares one file with the Transformers tokenizer and scores test examples through
llama.cpp; `check_losses` puts base, adapter, merged and every GGUF side by side. Each raises GateError at
the first thing that differs, so that what promotion writes has passed all of it.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deploy.gguf_model import NOT_SUPERVISED, GgufModel, LookAtExample, open_gguf
from deploy.gguf_types import QUANTIZATIONS, UNQUANTIZED
from deploy.modelfile import adds_bos
from training.evaluate import mean_loss
from training.exceptions import GateError

BASE, ADAPTER, MERGED = "base", "adapter", "merged"
BASE_4BIT, ADAPTER_4BIT = "base (4-bit)", "adapter (4-bit)"
"""What a trial over a 4-bit base was scored as; what ships is merged onto BASE in full precision."""

MERGED_TOLERANCE = 0.02
MERGED_TOLERANCE_4BIT = 0.2
"""Nats a token between adapter and merged model; over 4-bit the two have different bases."""
LOST_SHARE = 0.1
"""The f16 GGUF may differ from the merged model, example by example, by this share of what the adapter
changed: a lost adapter differs by all of it, however little the adapter changed."""
NUM_ANSWERS = 4
MIN_ANSWER_TOKENS = 512
"""Up to four prompts with short answers are tried until one answer ends; a wordy model is not endless."""

STRINGS = (
    "Hello, world!",
    " leading and trailing ",
    "two  spaces   three\ttab\n\nnewlines\r\n windows",
    "    def f(x: int) -> str:\n        return f'{x!r:>10}'  # four spaces\n",
    "for (int i = 0; i < 10; ++i) { a[i] += *p++ ^ 0xFF; }",
    "SELECT * FROM \"t\" WHERE a >= 1.5e-3 AND b != 'x';",
    '{"key": [1, 2.0, null, true], "näme": "\\u00e9\\n"}',
    "https://example.org/a/b?c=d&e=%20f#g",
    "0 1 12 123 1234 12345 3.14159 1,000,000 2024-01-31 12:59:59",
    "I'm you're we'll they've he'd it's DON'T I'M",
    "Ünïcödé façade naïve Straße ŒUVRE ﬁ ﬂ",
    "e\u0301 n\u0303 (combining) \u00a0nbsp \u200bzero \u2003em",
    "日本語のテキスト、漢字とカナ。",
    "中文分词测试：北京大学。",
    "한국어 문장입니다.",
    "Привет, мир! Ёжик.",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "हिन्दी में परीक्षण",
    "ภาษาไทย ทดสอบ",
    "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 ❤️",
    "∑ ∫ √ ≤ ≠ α β γ → ⇒ ½ ²",
    "a" * 50 + "!" * 20 + "=" * 40,
    "snake_case camelCase SCREAMING_CASE kebab-case x1y2z3",
    "...,,,;;;:::???!!! — – “quotes” ‘single’ «guillemets»",
    "\n",
    " ",
    "   \n   \n\t",
)


def verify_gguf(
    path: Path,
    tokenizer: Any,
    examples: Sequence[Mapping[str, Any]],
    look: LookAtExample | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Checks one GGUF against the tokenizer it was made with, and scores `examples`.

    Args:
        path: the file.
        tokenizer: the Transformers tokenizer of the merged model.
        examples: test examples with `example_id`, `input_ids`, `labels`.
        look: sees the logits of their supervised tokens (`deploy.measure`).

    Returns:
        What was checked, and the per-example losses.

    Raises:
        GateError: the file differs from the tokenizer, or its answers do not end.
        ModelError: llama.cpp cannot load or run it.
    """
    prompts = _answer_prompts(examples)
    longest = max(
        [len(example["input_ids"]) for example in examples]
        + [len(prompt) + limit for prompt, limit in prompts]
    )
    with open_gguf(path, num_ctx=longest + 8) as gguf:
        record = {
            "size_bytes": path.stat().st_size,
            "num_params": gguf.num_params,
            "tokenizer": check_tokens(gguf, tokenizer, _texts(tokenizer, examples)),
            "chat_template": check_template(gguf, tokenizer),
            "special_tokens": check_special_tokens(gguf, tokenizer, examples),
            "answers": check_answers_end(gguf, prompts),
        }
        return record, gguf.example_losses(examples, look)


def check_tokens(gguf: GgufModel, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Every text becomes the same token ids in llama.cpp and in Transformers, as it would in a chat.

    llama.cpp has no Unicode normalisation. Where the tokenizer composes letters first (NFC: Qwen), texts
    are compared composed, as they are typed and stored nearly always.
    """
    start, is_nfc = _start(tokenizer), _composes(tokenizer)
    for text in texts:
        if is_nfc:
            text = unicodedata.normalize("NFC", text)
        expected = tokenizer(start + text, add_special_tokens=False)["input_ids"]
        found = gguf.tokenize(start + text, add_special=False)
        if found != expected:
            at = next(
                (
                    i
                    for i, pair in enumerate(zip(found, expected, strict=False))
                    if len({*pair}) > 1
                ),
                min(len(found), len(expected)),
            )
            raise GateError(
                f"{gguf.path.name}: the tokenizer differs from Transformers' on {text[:40]!r}: "
                f"token {at} is {found[at : at + 3]}, but must be {expected[at : at + 3]}"
            )
    return {
        "num_texts": len(texts),
        "num_different": 0,
        "after_bos": bool(start),
        "composed": is_nfc,
    }


def _composes(tokenizer: Any) -> bool:
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"


def _start(tokenizer: Any) -> str:
    """BOS where the tokenizer puts a space before the very first word of a text, and nowhere else.

    llama.cpp can put one there only if it does so after every special token, too. The file has none, so
    that chats, which begin with BOS, are right, and plain text is compared as it stands in one.
    """
    if tokenizer.bos_token is None:
        return ""
    alone, after_bos = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("a", tokenizer.bos_token + "a")
    )
    return "" if alone == after_bos[1:] else tokenizer.bos_token


def check_template(gguf: GgufModel, tokenizer: Any) -> dict[str, Any]:
    """The file carries the tokenizer's chat template, byte for byte."""
    expected = default_template(tokenizer)
    found = gguf.metadata("tokenizer.chat_template")
    if found != expected:
        raise GateError(
            f"{gguf.path.name}: the chat template is {_size(found)}, but must be the tokenizer's "
            f"({_size(expected)}), byte for byte"
        )
    return {"identical": True, "size_bytes": len((expected or "").encode("utf-8"))}


def check_special_tokens(
    gguf: GgufModel, tokenizer: Any, examples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """BOS is added where Transformers adds it and once only; the trained end token ends an answer."""
    expected = adds_bos(tokenizer)
    if gguf.adds_bos != expected:
        raise GateError(
            f"{gguf.path.name}: llama.cpp {'adds' if gguf.adds_bos else 'does not add'} a BOS to "
            f"plain text, but must do as Transformers, which {'does' if expected else 'does not'}"
        )
    num_bos = _check_chat_prompt(gguf, tokenizer)
    if gguf.eos_token_id != tokenizer.eos_token_id:
        raise GateError(
            f"{gguf.path.name}: the end token is {gguf.eos_token_id}, but must be the tokenizer's "
            f"{tokenizer.eos_token_id}"
        )
    for token in {gguf.eos_token_id, *_trained_ends(tokenizer, examples)}:
        if not gguf.is_end(token):
            raise GateError(
                f"{gguf.path.name}: answers were trained to end with token {token} "
                f"({tokenizer.decode([token])!r}), but llama.cpp does not stop at it"
            )
    return {"adds_bos": expected, "num_bos_in_chat": num_bos, "eos_token_id": gguf.eos_token_id}


def check_answers_end(
    gguf: GgufModel, prompts: Sequence[tuple[list[int], int]]
) -> dict[str, Any] | None:
    """A greedy answer to a test prompt ends by itself; None where the data has no prompts.

    Args:
        gguf: the file.
        prompts: token ids, and how many tokens the answer may have; tried in order until one ends.
    """
    if not prompts:
        return None
    lengths: list[int] = []
    for prompt, limit in prompts:
        answer = gguf.generate(prompt, min(limit, gguf.num_ctx_train - len(prompt)))
        lengths.append(len(answer))
        if gguf.is_end(answer[-1]):
            return {"num_prompts": len(lengths), "num_ended": 1, "num_tokens": lengths}
    raise GateError(
        f"{gguf.path.name}: none of {len(prompts)} answers to test prompts ended within "
        f"{max(lengths)} tokens; more steps on answers that end teach it to"
    )


def check_losses(losses: Mapping[str, pd.DataFrame], *, forced: bool = False) -> dict[str, Any]:
    """Compares mean losses on the same examples: base, adapter, merged, then each GGUF by its type.

    A trial over a 4-bit base has ADAPTER_4BIT in the place of ADAPTER, and BASE_4BIT beside BASE.

    Args:
        losses: per-example losses by form.
        forced: the model is promoted although it need not beat its base.

    Raises:
        GateError: a loss is farther from the merged model's than its tolerance, a GGUF is no better
            than the base model, or the f16 GGUF does not carry the adapter.
    """
    means = {name: mean_loss(frame) for name, frame in losses.items()}
    base, merged = means[BASE], means[MERGED]
    allowed = {ADAPTER: MERGED_TOLERANCE, ADAPTER_4BIT: MERGED_TOLERANCE_4BIT}
    tolerances = {name: tolerance for name, tolerance in allowed.items() if name in means}
    tolerances |= {name: QUANTIZATIONS[name].tolerance for name in means if name in QUANTIZATIONS}
    for name, tolerance in tolerances.items():
        difference = abs(means[name] - merged)
        if not difference <= tolerance:
            raise GateError(
                f"{name}: test loss is {means[name]:.4f}, but must be within {tolerance} of the "
                f"merged model's {merged:.4f}"
            )
    for name in (MERGED, *(name for name in means if name in QUANTIZATIONS)):
        if not means[name] < base and not forced:
            raise GateError(
                f"{name}: test loss is {means[name]:.4f}, but must be below the base model's "
                f"{base:.4f}" + ("" if name == MERGED else "; a larger quantisation loses less")
            )
    share = _share_lost(losses[BASE], losses[MERGED], losses[UNQUANTIZED])
    if not share <= LOST_SHARE:
        raise GateError(
            f"{UNQUANTIZED}: differs from the merged model by {share:.0%} of what the adapter "
            f"changed, but must by at most {LOST_SHARE:.0%}: the adapter is not in the file"
        )
    return {
        "num_examples": len(losses[MERGED]),
        "loss": means,
        "tolerance": tolerances,
        "f16_difference_share": share,
        "f16_difference_share_allowed": LOST_SHARE,
    }


def default_template(tokenizer: Any) -> str | None:
    """The chat template in use; a tokenizer may carry several by name."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _check_chat_prompt(gguf: GgufModel, tokenizer: Any) -> int | None:
    """The prompt of a chat has the same tokens in both, so one BOS at most; returns their number."""
    if default_template(tokenizer) is None:
        return None
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = gguf.chat_tokens(messages)
    if found != expected:
        raise GateError(
            f"{gguf.path.name}: a chat's prompt starts with the tokens {found[:4]}, but must "
            f"start with {expected[:4]}, as Transformers renders it"
        )
    num_bos = 0
    while num_bos < len(found) and found[num_bos] == tokenizer.bos_token_id:
        num_bos += 1
    if num_bos > 1:
        raise GateError(f"{gguf.path.name}: a chat's prompt has {num_bos} BOS, but must have one")
    return num_bos


def _trained_ends(tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> set[int]:
    """Special tokens that close answers (a template may put a newline after them)."""
    special = set(tokenizer.all_special_ids)
    ends = set()
    for example in examples:
        ends.update(
            label
            for label, after in pairwise([*example["labels"], NOT_SUPERVISED])
            if label in special and after not in special
        )
    return ends


def _answer_prompts(examples: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], int]]:
    """Prompts of the examples with the shortest answers, with how long an answer may be."""
    found = []
    for example in examples:
        labels = np.asarray(example["labels"])
        supervised = np.flatnonzero(labels != NOT_SUPERVISED)
        if len(supervised) and supervised[0] > 0:
            start = int(supervised[0])
            rest = labels[start:]
            ends = np.flatnonzero(rest == NOT_SUPERVISED)
            answer = int(ends[0]) if len(ends) else len(rest)
            found.append((answer, list(example["input_ids"][:start])))
    found.sort(key=lambda item: item[0])
    return [(prompt, max(2 * answer, MIN_ANSWER_TOKENS)) for answer, prompt in found[:NUM_ANSWERS]]


def _texts(tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The list above, one string a special token, and the test examples' own text."""
    special = [f"before {token} after{token}" for token in tokenizer.all_special_tokens]
    own = [tokenizer.decode(list(example["input_ids"])) for example in examples]
    return [*STRINGS, *special, *own]


def _share_lost(base: pd.DataFrame, merged: pd.DataFrame, gguf: pd.DataFrame) -> float:
    frames = [frame.set_index("example_id").sort_index() for frame in (base, merged, gguf)]
    base_N, merged_N, gguf_N = (frame["loss_sum"].to_numpy() for frame in frames)
    changed = np.abs(base_N - merged_N).sum()
    return float(np.abs(gguf_N - merged_N).sum() / changed) if changed else float("inf")


def _size(template: str | None) -> str:
    return "missing" if template is None else f"{len(template.encode('utf-8'))} bytes"
