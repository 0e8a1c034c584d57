"""Examples for one trial: load -> messages -> three-way split -> tokens and labels, kept for the next start.

The split comes before everything else and depends on each conversation's content alone: a duplicate
cannot sit on two sides, and neither the order of the file nor a new record moves another one.
`train` teaches, `validation` gives `eval/loss` and chooses, `test` is scored once.
"""

import contextlib
import hashlib
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from training.chat import IGNORE, ChatRenderer, Rendered, tokenize
from training.config import TrialConfig
from training.exceptions import DataError
from training.formats import Messages, to_messages
from training.model import end_token_ids, resolve_model
from training.paths import cache_dir, read_json, write_directory, write_json
from training.sources import iter_records

_VERSION = 1
"""Of what is made from a record; another number makes the cache anew."""

DATA_SETTINGS = (
    "dataset_name",
    "dataset_train_split",
    "validation_fraction",
    "test_fraction",
    "max_eval_samples",
    "max_length",
)
"""Settings that the examples follow from, besides the model's tokenizer."""

_FACTS = "facts.json"
_TOKENIZE_BATCH = 1000
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSplits:
    """Tokenised examples; columns `example_id` (text), `input_ids` and `labels` (-100: no label)."""

    train: Dataset
    validation: Dataset
    test: Dataset
    hashes: dict[str, str]
    """`train_hash`, `validation_hash`, `test_hash`: of the examples' ids, tokens and labels."""
    counts: dict[str, int]
    """Examples in each split."""
    left_out: dict[str, int]
    """Records by the reason they are not used."""

    def describe(self) -> str:
        """`5,637 train, 48 validation, 48 test examples (12 duplicates left out)`."""
        counts = ", ".join(f"{self.counts[name]:,} {name}" for name in _SPLITS)
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.left_out.items())
        return f"{counts} examples" + (f" (left out: {reasons})" if reasons else "")


@dataclass(frozen=True)
class _Example:
    example_id: str
    input_ids: np.ndarray
    labels: np.ndarray


def load_splits(config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> DataSplits:
    """Reads, splits and tokenises the dataset, or takes from the cache what an earlier start made of it.

    The cache is found by the records themselves, the tokenizer with its template, and the settings that
    enter: whatever changes one of them makes other examples.

    Raises:
        DataError: it is missing or empty, a record has an unknown format, a split is empty, or no
            example has a supervised token left.
    """
    end_ids = sorted(end_token_ids(tokenizer, resolve_model(config)))
    end_tokens = [str(tokenizer.convert_ids_to_tokens(index)) for index in end_ids]
    cached = cache_dir() / "examples" / _fingerprint(config, tokenizer, end_tokens)
    if (cached / _FACTS).is_file():
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: make it again
            return _load(cached)
    splits = _make_splits(config, tokenizer, end_tokens)
    write_directory(cached, lambda draft: _save(splits, draft))
    return splits


def _make_splits(
    config: TrialConfig, tokenizer: PreTrainedTokenizerBase, end_tokens: list[str]
) -> DataSplits:
    renderer = ChatRenderer(tokenizer, end_tokens)
    left_out: dict[str, int] = {}
    texts: dict[str, dict[str, Rendered]] = {name: {} for name in _SPLITS}
    seen: set[str] = set()
    for where, record in iter_records(config):
        messages = to_messages(record, where)
        digest = content_hash(messages)
        if digest in seen:
            _count(left_out, "duplicates")
            continue
        seen.add(digest)
        split = split_of(digest, config)
        texts[split][digest] = renderer.render(messages, where)
    if not seen:
        raise DataError(f"dataset_name is {config.dataset_name}, but it holds no records")
    for name in ("validation", "test"):
        # The smallest hashes: the same choice however the file is ordered.
        kept = sorted(texts[name])[: config.max_eval_samples]
        if len(kept) < len(texts[name]):
            _count(left_out, f"{name} beyond max_eval_samples", len(texts[name]) - len(kept))
        texts[name] = {digest: texts[name][digest] for digest in kept}
    dropped: dict[str, int] = {}
    examples = {name: _tokenize(texts[name], config, tokenizer, dropped) for name in _SPLITS}
    _refuse_empty(examples, config, dropped, len(seen))
    datasets = {name: _to_dataset(examples[name]) for name in _SPLITS}
    return DataSplits(
        **datasets,
        hashes={f"{name}_hash": _hash_examples(examples[name]) for name in _SPLITS},
        counts={name: len(examples[name]) for name in _SPLITS},
        left_out={**left_out, **dropped},
    )


def _fingerprint(
    config: TrialConfig, tokenizer: PreTrainedTokenizerBase, end_tokens: list[str]
) -> str:
    digest = hashlib.sha256(f"{_VERSION} {transformers.__version__}".encode())
    settings = [getattr(config, name) for name in DATA_SETTINGS]
    facts = [settings, end_tokens, tokenizer.chat_template, repr(tokenizer)]
    digest.update(json.dumps(facts).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else "").encode())
    for _, record in iter_records(config):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def _save(splits: DataSplits, directory: Path) -> None:
    for name in _SPLITS:
        pq.write_table(getattr(splits, name).data.table, directory / f"{name}.parquet")
    facts = {"hashes": splits.hashes, "counts": splits.counts, "left_out": splits.left_out}
    write_json(directory / _FACTS, facts)


def _load(directory: Path) -> DataSplits:
    datasets = {
        name: Dataset(pq.read_table(directory / f"{name}.parquet"))  # no second copy in HF's cache
        for name in _SPLITS
    }
    return DataSplits(**datasets, **read_json(directory / _FACTS))


def content_hash(messages: Messages) -> str:
    """sha256 (hex) of a conversation, blind to Unicode form and to white space around a message."""
    plain = [
        (message["role"], unicodedata.normalize("NFC", message["content"]).strip())
        for message in messages
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def split_of(digest: str, config: TrialConfig) -> str:
    """`train`, `validation` or `test`: the hash is a uniform number in [0, 1)."""
    position = int(digest[:16], 16) / 2**64
    if position < config.test_fraction:
        return "test"
    if position < config.test_fraction + config.validation_fraction:
        return "validation"
    return "train"


_NO_ANSWER = "without an assistant turn"
_CUT_OFF = "with the answer beyond max_length"


def _tokenize(
    texts: dict[str, Rendered],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    dropped: dict[str, int],
) -> list[_Example]:
    items = list(texts.items())
    examples = []
    for start in range(0, len(items), _TOKENIZE_BATCH):
        batch = items[start : start + _TOKENIZE_BATCH]
        tokenized = tokenize(tokenizer, [rendered for _, rendered in batch])
        for (digest, _), (ids, labels) in zip(batch, tokenized, strict=True):
            # The first token is never predicted, so a label there does not count.
            supervised = np.flatnonzero(labels[1:] != IGNORE)
            if len(supervised) == 0:
                _count(dropped, _NO_ANSWER)
            elif supervised[0] + 1 >= config.max_length:
                _count(dropped, _CUT_OFF)
            else:
                cut = slice(config.max_length)
                examples.append(_Example(digest[:16], ids[cut], labels[cut]))
    return examples


def _refuse_empty(
    examples: dict[str, list[_Example]],
    config: TrialConfig,
    dropped: dict[str, int],
    num_records: int,
) -> None:
    name = config.dataset_name
    if not any(examples.values()):
        if dropped.get(_CUT_OFF, 0) > dropped.get(_NO_ANSWER, 0):
            raise DataError(
                f"max_length is {config.max_length}, but must be longer: it cuts off the answers "
                f"of {dropped[_CUT_OFF]} of {num_records} examples of {name}"
            )
        raise DataError(
            f"dataset_name is {name}, but none of its {num_records} records has an assistant turn "
            "to train on, so every label would be masked"
        )
    for split in _SPLITS:
        if examples[split]:
            continue
        remedy = (
            f"raise {split}_fraction, which is {getattr(config, f'{split}_fraction')}"
            if split != "train"
            else "add records"
        )
        raise DataError(
            f"dataset_name is {name}, but the {split} split of its {num_records} records is "
            f"empty: {remedy}"
        )


def _to_dataset(examples: list[_Example]) -> Dataset:
    columns: dict[str, Any] = {
        "example_id": [example.example_id for example in examples],
        "input_ids": [example.input_ids for example in examples],
        "labels": [example.labels for example in examples],
    }
    return Dataset.from_dict(columns)


def _hash_examples(examples: list[_Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.example_id.encode())
        digest.update(example.input_ids.tobytes())
        digest.update(example.labels.tobytes())
    return digest.hexdigest()[:16]


def _count(counts: dict[str, int], reason: str, number: int = 1) -> None:
    counts[reason] = counts.get(reason, 0) + number
