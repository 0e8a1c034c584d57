"""Both engines against plain TRL on conversations, and what each leaves in a trial's directory."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from training.config import TrialConfig
from training.data import load_splits
from training.evaluate import example_losses, mean_loss
from training.exceptions import ModelError
from training.job import Engine
from training.model import load_model, load_tokenizer
from training.paths import TrialPaths, read_json
from training.run import run_trial


def metrics_of(paths: TrialPaths, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def config(tiny_settings: dict[str, Any]) -> TrialConfig:
    return TrialConfig.from_dict(
        {
            **tiny_settings,
            "max_steps": 10,
            "lora_r": 4,
            "warmup_steps": 3,
            "lr_scheduler_type": "cosine",
            "gradient_accumulation_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
        }
    )


@pytest.fixture(scope="module", params=["packed", "trl"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


@pytest.fixture(scope="module")
def trained(
    config: TrialConfig, engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrialPaths, dict[str, Any]]:
    paths = TrialPaths(tmp_path_factory.mktemp(engine) / "0000")
    return paths, run_trial(config, paths, report_to="none", engine=engine)


def test_the_adapter_in_plain_peft_has_the_reported_loss(
    config: TrialConfig, trained: tuple[TrialPaths, dict[str, Any]]
) -> None:
    paths, result = trained
    splits = load_splits(config, load_tokenizer(config))
    model: Any = PeftModel.from_pretrained(load_model(config), str(paths.adapter))
    loss = mean_loss(example_losses(model.get_base_model(), splits.validation, 3))
    assert loss == pytest.approx(result["eval/loss"], rel=1e-5)


def test_the_curve_equals_a_plain_trl_run_on_conversations(
    config: TrialConfig, trained: tuple[TrialPaths, dict[str, Any]], tmp_path: Path
) -> None:
    """TRL gets the messages, and finds tokens, labels and order by itself."""
    tokenizer: Any = load_tokenizer(config)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    train = load_splits(config, load_tokenizer(config)).train
    records = [json.loads(line) for line in Path(config.dataset_name).read_text().splitlines()]
    by_text = {
        tokenizer.apply_chat_template(record["messages"], tokenize=False): record
        for record in records
    }
    ordered = [by_text[tokenizer.decode(ids)] for ids in train["input_ids"]]
    losses: list[float] = []

    class Losses(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = SFTTrainer(
        model=load_model(config),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=10,
            learning_rate=1e-2,
            warmup_steps=3,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            weight_decay=0.1,
            max_grad_norm=0.5,
            max_length=64,
            seed=42,
            logging_steps=1,
            assistant_only_loss=True,
            activation_checkpointing=False,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(ordered),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Losses()],
    )
    trainer.train()
    ours = metrics_of(trained[0], "train/loss")
    assert list(ours.values()) == pytest.approx(losses, rel=1e-5)


def test_the_learning_rate_is_the_one_the_step_used(
    trained: tuple[TrialPaths, dict[str, Any]],
) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    schedule = transformers.get_scheduler("cosine", optimizer, 3, 10)
    expected = []
    for _ in range(10):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = metrics_of(trained[0], "learning_rate")
    assert list(ours.values()) == pytest.approx(expected)


def test_every_evaluation_is_kept_per_example(
    trained: tuple[TrialPaths, dict[str, Any]],
) -> None:
    paths, result = trained
    curve = metrics_of(paths, "eval/loss")
    assert list(curve) == [0, 4, 8, 10]  # the base model, each eval_steps, the last step
    for step, loss in curve.items():
        assert mean_loss(pd.read_parquet(paths.eval_losses(step))) == pytest.approx(loss)
    best = min((loss, step) for step, loss in curve.items() if step > 0)
    assert (result["eval/loss"], result["best_step"]) == best
    assert result["base_eval/loss"] == curve[0]
    assert result["last_eval/loss"] == curve[10]


def test_the_trial_learns(trained: tuple[TrialPaths, dict[str, Any]]) -> None:
    result = trained[1]
    assert result["eval/loss"] < result["base_eval/loss"] - 0.5


def test_the_result_counts_tokens_without_padding(
    config: TrialConfig, trained: tuple[TrialPaths, dict[str, Any]]
) -> None:
    splits = load_splits(config, load_tokenizer(config))
    lengths = [len(ids) for ids in splits.train["input_ids"]]
    # 40 sequences of a set of 84, each at most once: a plausible sum, and the same as in the metrics.
    tokens = trained[1]["tokens"]
    assert 40 * min(lengths) <= tokens <= 40 * max(lengths)


def test_a_second_trial_in_the_process_starts_from_the_same_base(
    config: TrialConfig,
    engine: Engine,
    trained: tuple[TrialPaths, dict[str, Any]],
    tmp_path: Path,
) -> None:
    paths = TrialPaths(tmp_path / "0001")
    run_trial(config, paths, report_to="none", engine=engine)
    assert metrics_of(paths, "train/loss") == metrics_of(trained[0], "train/loss")
    assert metrics_of(paths, "eval/loss") == metrics_of(trained[0], "eval/loss")


def test_a_loss_that_is_not_finite_ends_the_trial_as_failed(
    config: TrialConfig, engine: Engine, tmp_path: Path
) -> None:
    wild = TrialConfig.from_dict({**config.to_dict(), "learning_rate": 1e30, "max_grad_norm": 0})
    paths = TrialPaths(tmp_path / "0000")
    result = run_trial(wild, paths, report_to="none", engine=engine)
    assert result["state"] == "failed"
    assert "at step" in result["reason"]
    assert result["num_steps"] < 10
    assert read_json(paths.result) == result
    assert all(math.isfinite(value) for value in result.values() if isinstance(value, float))


def test_a_misspelt_target_module_is_the_users_error(
    config: TrialConfig, engine: Engine, tmp_path: Path
) -> None:
    wrong = TrialConfig.from_dict({**config.to_dict(), "lora_target_modules": ["q_proj", "v_prj"]})
    with pytest.raises(ModelError, match="lora_target_modules names 'v_prj'"):
        run_trial(wrong, TrialPaths(tmp_path / "0000"), report_to="none", engine=engine)


def test_bfloat16_on_a_cpu_trains(config: TrialConfig, engine: Engine, tmp_path: Path) -> None:
    settings = {**config.to_dict(), "dtype": "bfloat16", "max_steps": 2}
    paths = TrialPaths(tmp_path / "0000")
    result = run_trial(TrialConfig.from_dict(settings), paths, report_to="none", engine=engine)
    assert result["eval/loss"] < result["base_eval/loss"]
