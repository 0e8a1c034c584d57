import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from training.config import TrialConfig
from training.evaluate import example_losses, mean_loss
from training.exceptions import ModelError
from training.model import load_model, load_tokenizer, prepare_demo_model, resolve_model


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


@pytest.mark.parametrize("kept", [0, 1000])
def test_damaged_weights_are_one_line(tiny_model_dir: Path, tmp_path: Path, kept: int) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model, but its weights are damaged: .*header") as error:
        load_model(TrialConfig(model_name_or_path=str(directory)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize(
    ("lost", "must"),
    [
        ("", r"but its weights lack lm_head.weight \(tensors missing: 21\)"),
        ("model.norm", r"but its weights lack model.norm.weight \(tensors missing: 1\)"),
    ],
)
def test_weights_without_some_of_the_models_tensors_are_refused(
    tiny_model_dir: Path, tmp_path: Path, lost: str, must: str, load_in_4bit: bool
) -> None:
    """The fixture's own file has no lm_head.weight, which is tied, and loads in every other test."""
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = TrialConfig(model_name_or_path=str(directory), load_in_4bit=load_in_4bit)
    with pytest.raises(ModelError, match=f"{must}$"):
        load_model(config)


def test_weights_of_another_shape_are_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"shape of model.norm.weight is \[63\], but must be \[64\]$"
    ):
        load_model(TrialConfig(model_name_or_path=str(directory)))


def test_bfloat16_on_a_gpu_without_it_is_one_line(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    config = TrialConfig(model_name_or_path=str(tiny_model_dir), dtype="bfloat16")
    with pytest.raises(ModelError, match=r"dtype is bfloat16, but must be .* as the Tesla T4 is$"):
        load_model(config)


def test_a_disk_that_fills_up_under_the_demo_model_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(directory: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path))
    monkeypatch.setattr("training.model._write_demo_model", fill_disk)
    with pytest.raises(OSError, match="SmolLM2-135M-Instruct") as error:
        prepare_demo_model()
    assert error.value.errno == errno.ENOSPC


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
