from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from datasets import Dataset

from training import head
from training.evaluate import example_losses, mean_loss
from training.exceptions import ModelError

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = [
    transformers.LlamaConfig(**TINY),
    transformers.Qwen3Config(**TINY),
    transformers.Gemma2Config(**TINY, final_logit_softcapping=5.0),
    transformers.CohereConfig(**TINY, logit_scale=0.25),
    transformers.GraniteConfig(**TINY, logits_scaling=4.0),
]


def make_model(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_examples(num: int = 7) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(num):
        length = 3 + 5 * index % 17
        ids = torch.randint(3, 97, (length,), generator=generator)
        labels = ids.clone()
        labels[torch.rand(length, generator=generator) < 0.4] = -100
        labels[-1] = ids[-1]
        rows.append(
            {"example_id": f"e{index}", "input_ids": ids.tolist(), "labels": labels.tolist()}
        )
    return Dataset.from_list(rows)


def reference(model: Any, dataset: Dataset) -> pd.DataFrame:
    """Each example alone through the model's own loss."""
    rows = []
    for example in dataset.to_list():
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        num_tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss.item() * num_tokens
        rows.append(
            {"example_id": example["example_id"], "loss_sum": loss, "num_tokens": num_tokens}
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_losses_equal_the_models_own(config: Any) -> None:
    model, examples = make_model(config), make_examples()
    losses = example_losses(model, examples, batch_size=3)
    expected = reference(model, examples)
    pd.testing.assert_frame_equal(losses, expected, rtol=1e-5)


def test_losses_do_not_depend_on_batch_size_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = make_model(ARCHITECTURES[0]), make_examples()
    whole = example_losses(model, examples, batch_size=7)
    monkeypatch.setattr(head, "MAX_LOGITS", 97 * 2)  # two positions at a time
    pd.testing.assert_frame_equal(example_losses(model, examples, batch_size=1), whole, rtol=1e-5)


def test_the_mean_weighs_tokens_not_examples() -> None:
    losses = pd.DataFrame({"loss_sum": [2.0, 9.0], "num_tokens": [1, 9]})
    assert mean_loss(losses) == pytest.approx(1.1)


def test_whole_logits_never_exist() -> None:
    """The head sees supervised positions only: with one in an example, one row an example."""
    model, examples = make_model(ARCHITECTURES[0]), make_examples()
    labels = [[-100] * (len(row) - 1) + row[-1:] for row in examples["labels"]]
    examples = examples.remove_columns("labels").add_column("labels", labels)
    rows_seen: list[int] = []
    example_losses(model, examples.select([0]), 1)  # without the hook: the check of the head
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _module, inputs, _output: rows_seen.append(inputs[0].numel() // 32)
    )
    example_losses(model, examples, batch_size=7)
    hook.remove()
    assert rows_seen[-1] == 7


def test_a_model_in_training_stays_in_training() -> None:
    model = make_model(ARCHITECTURES[0]).train()
    example_losses(model, make_examples(1), 1)
    assert model.training


def test_a_model_with_logits_of_its_own_kind_is_refused() -> None:
    model = make_model(ARCHITECTURES[0])
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = shifted
    with pytest.raises(ModelError, match="LlamaForCausalLM computes its logits in a way"):
        example_losses(model, make_examples(1), 1)
