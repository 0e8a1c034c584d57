"""What trials of one process share: the base model and the tokenised data.

Each is kept for the next trial that needs the same, so that a sweep loads its model once.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.config import TrialConfig
from training.data import DATA_SETTINGS, DataSplits, load_splits
from training.examples import Examples
from training.model import load_model, load_tokenizer, resolve_model
from training.sources import local_file

_MODEL_SETTINGS = (
    "model_name_or_path",
    "model_revision",
    "trust_remote_code",
    "dtype",
    "load_in_4bit",
)
_DATA_SETTINGS = ("model_name_or_path", "model_revision", "trust_remote_code", *DATA_SETTINGS)


@dataclass(frozen=True)
class Prepared:
    """All that a trial needs before its first step."""

    tokenizer: PreTrainedTokenizerBase
    splits: DataSplits
    model: PreTrainedModel
    """The frozen base model, without an adapter of its own."""
    train: Examples
    validation: Examples
    model_key: str
    """Equal for trials that can share a pack."""
    data_key: str
    content: str
    """Hash of the base model's files, its dtype and device, and the examples."""


def prepare(config: TrialConfig) -> Prepared:
    """Loads, or takes what the process has already. Data come first: they fail for less.

    Raises:
        DataError, ModelError: what is wrong with either.
    """
    data_key = _key(config, _DATA_SETTINGS)
    file = local_file(config)
    if file is not None:
        status = file.stat()
        data_key += f"\n{status.st_mtime_ns} {status.st_size}"
    key = model_key(config)
    tokenizer, splits, train, validation = _data(data_key)
    model, base = _model(key)
    content = _hash([base, splits.hashes])
    return Prepared(tokenizer, splits, model, train, validation, key, data_key, content)


def model_key(config: TrialConfig) -> str:
    """Equal for settings of the same base model."""
    return _key(config, _MODEL_SETTINGS)


def forget() -> None:
    """Frees everything: after a fault, the model may not be what it was."""
    _model.cache_clear()
    _data.cache_clear()


def _key(config: TrialConfig, names: tuple[str, ...]) -> str:
    return json.dumps({name: getattr(config, name) for name in names})


def _config(key: str) -> TrialConfig:
    return TrialConfig.from_dict(json.loads(key.splitlines()[0]))


@functools.lru_cache(maxsize=4)
def _data(key: str) -> tuple[PreTrainedTokenizerBase, DataSplits, Examples, Examples]:
    config = _config(key)
    tokenizer = load_tokenizer(config)
    splits = load_splits(config, tokenizer)
    print(f"  data {config.dataset_name}: {splits.describe()}", flush=True)
    return tokenizer, splits, Examples(splits.train), Examples(splits.validation)


@functools.lru_cache(maxsize=1)
def _model(key: str) -> tuple[PreTrainedModel, str]:
    """The base model, and a hash of its files."""
    config = _config(key)
    model = load_model(config)
    precision = "4-bit NF4" if config.load_in_4bit else str(model.dtype).removeprefix("torch.")
    print(
        f"  base model {config.model_name_or_path}: {model.num_parameters() / 1e6:,.0f} million "
        f"parameters, {precision}, on {model.device}",
        flush=True,
    )
    return model, _hash([_source_hash(config, model), str(model.dtype), model.device.type])


def _source_hash(config: TrialConfig, model: PreTrainedModel) -> str:
    """Of a hub model its commit, of a directory what is in it."""
    source = Path(resolve_model(config))
    commit = getattr(model.config, "_commit_hash", None)
    if not source.is_dir():
        return f"{source} {commit}"
    digest = hashlib.sha256()
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
