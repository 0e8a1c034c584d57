"""What tests share: a tiny random Llama with SmolLM2's tokenizer, a small chat dataset, settings for both."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from training.paths import cache_dir

# No test but those marked `network` may wait for a hub or a W&B server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models gain nothing from a second thread, and two processes of two threads each on two cores wait
# for one another most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _use_cache_of_its_own() -> None:
    """Prepared models and built parts are the user's; what tests add is gone with them."""
    theirs, ours = cache_dir(), Path(tempfile.mkdtemp(prefix="loraloom-tests-"))
    atexit.register(shutil.rmtree, ours, ignore_errors=True)
    for entry in theirs.iterdir() if theirs.is_dir() else []:
        if entry.name != "examples":
            (ours / entry.name).symlink_to(entry)
    os.environ["LORALOOM_CACHE"] = str(ours)


_use_cache_of_its_own()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, small enough to train in seconds, with SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.config import TrialConfig
    from training.model import load_tokenizer

    tokenizer: Any = load_tokenizer(TrialConfig())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 different questions about numbers, in the `messages` format."""
    path = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    lines = [
        json.dumps({"messages": [_turn("user", question), _turn("assistant", answer)]})
        for question, answer in (_question(number) for number in range(120))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_settings(tiny_model_dir: Path, tiny_dataset: Path) -> dict[str, Any]:
    """Settings of a trial that takes a second or two; `max_steps` and `lora_r` keep their defaults."""
    return {
        "model_name_or_path": str(tiny_model_dir),
        "dataset_name": str(tiny_dataset),
        "dtype": "float32",
        "max_length": 64,
        "validation_fraction": 0.15,
        "test_fraction": 0.15,
        "per_device_train_batch_size": 2,
        "eval_steps": 4,
        "learning_rate": 1e-2,
    }


def _question(number: int) -> tuple[str, str]:
    kind = "even" if number % 2 == 0 else "odd"
    return f"Is {number} even or odd?", f"The number {number} is {kind}."


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
