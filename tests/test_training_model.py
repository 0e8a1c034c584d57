import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from training.config import TrialConfig
from training.evaluate import example_losses, mean_loss
from training.exceptions import ModelError
from training.model import load_model, load_tokenizer, resolve_model


def test_the_demo_models_tokenizer_splits_digits_as_llama_cpp_does() -> None:
    tokenizer: Any = load_tokenizer(TrialConfig())
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


def test_the_demo_model_answers() -> None:
    config = TrialConfig()
    model: Any = load_model(config)
    tokenizer: Any = load_tokenizer(config)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in str(tokenizer.decode(answer[0], skip_special_tokens=True))


def test_a_base_model_is_frozen_and_in_evaluation_mode(tiny_model_dir: Path) -> None:
    model = load_model(TrialConfig(model_name_or_path=str(tiny_model_dir)))
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_tokenizer_that_pads_with_its_end_token_is_given_another_pad(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = TrialConfig(model_name_or_path=str(tiny_model_dir))
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(config)
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    again = load_tokenizer(TrialConfig(model_name_or_path=str(directory)))
    assert again.pad_token_id not in (None, again.eos_token_id)


def test_a_4bit_base_is_near_the_full_one_and_still_differentiable(
    tiny_settings: dict[str, Any],
) -> None:
    """After an evaluation, too: bitsandbytes may repack weights for inference on some CPUs."""
    from training.data import load_splits

    settings = {**tiny_settings, "model_name_or_path": "demo", "max_eval_samples": 2}
    config = TrialConfig.from_dict(settings)
    splits = load_splits(config, load_tokenizer(config))
    full = mean_loss(example_losses(load_model(config), splits.validation, 2))
    quantised: Any = load_model(TrialConfig.from_dict({**settings, "load_in_4bit": True}))
    loss = mean_loss(example_losses(quantised, splits.validation, 2))
    assert loss != full
    assert loss == pytest.approx(full, rel=0.15)
    embeddings = torch.randn(1, 4, quantised.config.hidden_size, requires_grad=True)
    quantised(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("missing", "must"),
    [
        ("config.json", "but that directory has no config.json"),
        ("model.safetensors", r"but that directory has no weights \(\*.safetensors\)"),
    ],
)
def test_an_incomplete_model_directory_is_one_line(
    tiny_model_dir: Path, tmp_path: Path, missing: str, must: str
) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (directory / missing).unlink()
    with pytest.raises(ModelError, match=must):
        resolve_model(TrialConfig(model_name_or_path=str(directory)))


def test_a_missing_model_directory_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"model_name_or_path is ./gone, but there is no such dir"):
        resolve_model(TrialConfig(model_name_or_path="./gone"))


def test_a_hub_model_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(ModelError) as error:
        load_tokenizer(TrialConfig(model_name_or_path="nobody/nothing"))
    assert str(error.value).startswith("model_name_or_path is nobody/nothing: ")
    assert "\n" not in str(error.value)


@pytest.mark.network
def test_a_hub_model_is_loaded() -> None:
    config = TrialConfig(model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert load_model(config).num_parameters() == 134_515_008
