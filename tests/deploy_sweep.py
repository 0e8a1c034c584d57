"""A finished sweep of one trained trial over a tiny random Llama, and its promotion, made once a session.

Every function takes the session's temporary directory. The base has hidden size 256, so that llama.cpp
uses real K-quants, and SmolLM2's tokenizer and chat template. Its adapter is trained until answers end by
themselves.
"""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.promote import PromoteOptions, promote
from training.config import TrialConfig
from training.data import load_splits
from training.evaluate import example_losses, mean_loss
from training.model import load_model, load_tokenizer, prepare_demo_model
from training.paths import PromotionPaths, SweepPaths, write_json

NUM_STEPS = 60
NUM_RECORDS = 80


@functools.cache
def tiny_base(root: Path) -> Path:
    """A random Llama of 13 million parameters, nearly all of them the embedding."""
    directory = root / "deploy" / "tiny-llama"
    tokenizer: Any = load_tokenizer(TrialConfig(model_name_or_path=str(prepare_demo_model())))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
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
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_config(root: Path) -> TrialConfig:
    base = tiny_base(root)
    data = base.parent / "questions.jsonl"
    if not data.is_file():
        data.write_text("\n".join(json.dumps(_record(n)) for n in range(NUM_RECORDS)) + "\n")
    settings: dict[str, Any] = {
        "model_name_or_path": str(base),
        "dataset_name": str(data),
        "dtype": "float32",
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "max_length": 64,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-2,
    }
    return TrialConfig.from_dict(settings)


@functools.cache
def trained_sweep(root: Path) -> Path:
    """`runs/tiny` with trial 0 complete. Copy it to change it."""
    paths = SweepPaths(root / "deploy" / "runs" / "tiny")
    config = tiny_config(root)
    tokenizer = load_tokenizer(config)
    splits = load_splits(config, tokenizer)
    base = load_model(config)
    base_loss = mean_loss(example_losses(base, splits.validation, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 with Transformers 5.23.
        lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        model: Any = get_peft_model(base, lora)
    _train(model, splits.train.to_list(), config)
    trial = paths.trial(0)
    model.eval().save_pretrained(str(trial.adapter))
    loss = mean_loss(example_losses(model.get_base_model(), splits.validation, 8))
    params = {"learning_rate": config.learning_rate}
    write_json(
        trial.config,
        {"settings": config.to_dict(), "number": 0, "name": "baseline", "params": params},
    )
    write_json(
        trial.result,
        {
            "state": "complete",
            "best_step": NUM_STEPS,
            "eval/loss": loss,
            "base_eval/loss": base_loss,
            **splits.hashes,
        },
    )
    paths.definition.write_text(yaml.safe_dump({"method": "grid"}), encoding="utf-8")
    return paths.root


@functools.cache
def promoted(root: Path) -> PromotionPaths:
    """Version 1 of the trained sweep, with its f16 GGUF kept beside the quantised one."""
    return promote(
        trained_sweep(root), PromoteOptions(quantization=["Q4_K_M", "F16"], output_name="tiny")
    )


def _record(number: int) -> dict[str, Any]:
    question, answer = f"Is {number} even?", "Yes, it is." if number % 2 == 0 else "No, it is odd."
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def _train(model: Any, examples: list[dict[str, Any]], config: TrialConfig) -> None:
    """AdamW on batches of 8; the language-model head runs at supervised positions only."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    inner = model.get_base_model()
    for step in range(NUM_STEPS):
        batch = [examples[(step * 8 + n) % len(examples)] for n in range(8)]
        length = max(len(example["input_ids"]) for example in batch)
        ids = torch.zeros(8, length, dtype=torch.long)
        labels = torch.full((8, length), -100)
        for row, example in enumerate(batch):
            ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
            labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
        hidden = inner.model(input_ids=ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        supervised = wanted != -100
        logits = inner.lm_head(hidden[supervised])
        loss = torch.nn.functional.cross_entropy(logits, wanted[supervised])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
