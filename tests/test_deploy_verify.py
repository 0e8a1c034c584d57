"""What verification catches: a lost adapter, another template, another tokenizer, endless answers."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from deploy_sweep import promoted, tiny_base, tiny_config
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from deploy.decoder import Decoder, open_decoder
from deploy.export_gguf import export_gguf
from deploy.gguf_model import open_gguf
from deploy.gguf_types import QUANTIZATIONS, check_quantizations
from deploy.merge import load_merged, merge_adapter
from deploy.quantize import quantize
from deploy.verify import (
    STRINGS,
    check_answers_end,
    check_losses,
    check_special_tokens,
    check_template,
    check_tokens,
    verify_gguf,
)
from training.config import TrialConfig
from training.data import load_splits
from training.evaluate import example_losses, mean_loss
from training.exceptions import ConfigError, GateError, ModelError
from training.model import load_model, load_tokenizer, prepare_demo_model
from training.paths import PromotionPaths, SweepPaths

CPU = torch.device("cpu")


@pytest.fixture
def version(tmp_path_factory: pytest.TempPathFactory) -> PromotionPaths:
    """The promoted version, shared: not to be changed."""
    return promoted(tmp_path_factory.getbasetemp())


@pytest.fixture
def gguf(version: PromotionPaths) -> Path:
    return version.gguf("tiny", "F16")


@pytest.fixture
def tokenizer(version: PromotionPaths) -> Any:
    return AutoTokenizer.from_pretrained(version.merged)


@pytest.fixture
def examples(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    config = tiny_config(tmp_path_factory.getbasetemp())
    return load_splits(config, load_tokenizer(config)).test.select(range(6))


@pytest.fixture(scope="session")
def base_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's GGUF: what a promotion that lost the adapter would write."""
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    export_gguf(tiny_base(tmp_path_factory.getbasetemp()), path, "base")
    return path


def _trial_losses(version: PromotionPaths, examples: Any) -> dict[str, pd.DataFrame]:
    """Base and adapter as the trial was scored, and the merged model."""
    trial = SweepPaths(version.root.parent.parent).trial(0)
    scored = {"base": pd.read_parquet(trial.test_losses(0))}
    scored["adapter"] = pd.read_parquet(trial.test_losses(60))
    losses = {
        name: frame.set_index("example_id").loc[examples["example_id"]].reset_index()
        for name, frame in scored.items()
    }
    losses["merged"] = example_losses(load_merged(version.merged, CPU), examples, 4)
    return losses


def test_llama_cpp_scores_every_example_as_transformers_does(
    version: PromotionPaths, gguf: Path, examples: Any
) -> None:
    expected = _trial_losses(version, examples)["merged"]

    with open_gguf(gguf, num_ctx=128) as model:
        found = model.example_losses(examples.to_list())

    assert found["example_id"].tolist() == expected["example_id"].tolist()
    assert found["num_tokens"].tolist() == expected["num_tokens"].tolist()
    assert found["loss_sum"].to_numpy() == pytest.approx(expected["loss_sum"].to_numpy(), abs=0.01)


def test_a_long_example_is_scored_as_the_same_one_in_pieces(gguf: Path) -> None:
    ids = [100 + n % 900 for n in range(400)]
    whole = {"example_id": "a", "input_ids": ids, "labels": [-100] * 10 + ids[10:]}
    head = {"example_id": "b", "input_ids": ids, "labels": [-100] * 10 + ids[10:300] + [-100] * 100}
    tail = {"example_id": "c", "input_ids": ids, "labels": [-100] * 300 + ids[300:]}

    with open_gguf(gguf, num_ctx=512) as model:
        losses = model.example_losses([whole, head, tail])["loss_sum"].to_numpy()

    # One token lost or counted twice is 2.6e-3. Flash attention's float16 sums, which differ with where a
    # batch ends, would be 7e-6.
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-6)


def test_scoring_in_parallel_from_a_shared_prefix_equals_one_example_after_the_other(
    gguf: Path, examples: Any
) -> None:
    rows = examples.to_list()
    with open_gguf(gguf, num_ctx=128, num_threads=1) as model:
        alone = [model.example_losses([row]) for row in rows]
    opened = []

    with pytest.MonkeyPatch.context() as patch, open_gguf(gguf, 128, num_threads=3) as model:
        patch.setattr("deploy.gguf_model.open_decoder", _recording(opened))
        together = model.example_losses(rows)

    assert [decoder.prefix_length > 20 for decoder in opened] == [True] * 3
    expected = pd.concat(alone, ignore_index=True)
    assert together["example_id"].tolist() == expected["example_id"].tolist()
    assert together["num_tokens"].tolist() == expected["num_tokens"].tolist()
    assert together["loss_sum"].to_numpy() == pytest.approx(
        expected["loss_sum"].to_numpy(), abs=0.02
    )


def test_a_supervised_token_is_never_in_the_shared_prefix(gguf: Path) -> None:
    ids = [100, 200, 300, 400, 500]
    rows = [
        {"example_id": "all", "input_ids": ids, "labels": ids},
        {"example_id": "end", "input_ids": ids, "labels": [-100] * 4 + ids[4:]},
        {"example_id": "none", "input_ids": ids, "labels": [-100] * 5},
    ]

    with open_gguf(gguf, num_ctx=32) as model:
        together = model.example_losses(rows)
        alone = [model.example_losses([row])["loss_sum"].item() for row in rows]

    assert together["num_tokens"].tolist() == [4, 1, 0]
    assert together["loss_sum"].tolist() == pytest.approx(alone, rel=1e-4)


def test_llama_cpp_takes_no_more_cores_than_the_process_may_use(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.gguf_model.num_cores", lambda: 3)

    with open_gguf(gguf, num_ctx=32) as model:
        assert model.num_threads == 3


def test_a_lost_adapter_does_not_pass(
    version: PromotionPaths, base_gguf: Path, tokenizer: Any, examples: Any
) -> None:
    losses = _trial_losses(version, examples)
    with open_gguf(base_gguf, num_ctx=128) as model:
        losses["F16"] = model.example_losses(examples.to_list())

    with pytest.raises(GateError, match=r"F16: test loss is 1\d\.\d+, but must be within 0\.01"):
        check_losses(losses)


def test_a_lost_adapter_that_changed_little_does_not_pass() -> None:
    base = _losses([3.0, 2.0, 2.5])
    merged = _losses([2.999, 1.999, 2.499])

    with pytest.raises(GateError, match=r"F16: test loss is 2.5000, but must be below the base"):
        check_losses({"base": base, "adapter": merged, "merged": merged, "F16": base})
    almost_base = _losses([2.9999, 1.9999, 2.4999])
    with pytest.raises(GateError, match="by 90% of what the adapter changed"):
        check_losses({"base": base, "adapter": merged, "merged": merged, "F16": almost_base})


def test_a_merged_model_that_is_not_the_adapter_does_not_pass() -> None:
    base, adapter, merged = (_losses([loss] * 3) for loss in (3.0, 2.0, 2.5))

    with pytest.raises(GateError, match=r"adapter: test loss is 2\.0000, but must be within 0\.02"):
        check_losses({"base": base, "adapter": adapter, "merged": merged, "F16": merged})


def test_a_model_that_is_promoted_by_force_need_not_beat_its_base_but_be_whole() -> None:
    base, worse = _losses([2.0, 2.1, 2.2]), _losses([2.3, 2.4, 2.5])
    losses = {"base": base, "adapter": worse, "merged": worse, "F16": worse}

    assert check_losses(losses, forced=True)["num_examples"] == 3
    with pytest.raises(GateError, match="below the base"):
        check_losses(losses)
    with pytest.raises(GateError, match="must be within"):
        check_losses({**losses, "F16": base}, forced=True)


def test_a_quantisation_that_loses_what_the_adapter_gained_does_not_pass() -> None:
    base, merged, quantized = (_losses([loss] * 3) for loss in (2.2, 2.0, 2.21))
    losses = {"base": base, "adapter": merged, "merged": merged, "F16": merged}

    with pytest.raises(GateError, match=r"Q4_K_M: .* below the base .* a larger quantisation"):
        check_losses({**losses, "Q4_K_M": quantized})
    with pytest.raises(GateError, match=r"Q8_0: .* must be within 0\.02 of the merged"):
        check_losses({**losses, "Q8_0": quantized})


def test_a_changed_chat_template_does_not_pass(gguf: Path, tokenizer: Any) -> None:
    tokenizer.chat_template += " "

    with (
        open_gguf(gguf, num_ctx=32) as model,
        pytest.raises(GateError, match=r"chat template is \d+ bytes, but must be"),
    ):
        check_template(model, tokenizer)


def test_another_pre_tokenizer_does_not_pass(gguf: Path, tokenizer: Any) -> None:
    """FACTS' trap: Transformers rebuilds the demo tokenizer without its rule for digits."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    with (
        open_gguf(gguf, num_ctx=32) as model,
        pytest.raises(GateError, match="the tokenizer differs from Transformers' on"),
    ):
        check_tokens(model, tokenizer, STRINGS)


def test_another_end_token_does_not_pass(gguf: Path, tokenizer: Any, examples: Any) -> None:
    tokenizer.eos_token = "<|endoftext|>"

    with (
        open_gguf(gguf, num_ctx=32) as model,
        pytest.raises(GateError, match="the end token is 2, but must be the tokenizer's 0"),
    ):
        check_special_tokens(model, tokenizer, examples.to_list())


def test_a_second_bos_does_not_pass(gguf: Path, tokenizer: Any, examples: Any) -> None:
    tokenizer.chat_template = "<|im_start|>" + tokenizer.chat_template

    with (
        open_gguf(gguf, num_ctx=32) as model,
        pytest.raises(GateError, match=r"a chat's prompt starts with the tokens \[1, 9690"),
    ):
        check_special_tokens(model, tokenizer, examples.to_list())


def test_answers_that_do_not_end_do_not_pass(base_gguf: Path, tokenizer: Any) -> None:
    prompt = tokenizer("Is 7 even?")["input_ids"]

    with (
        open_gguf(base_gguf, num_ctx=64) as model,
        pytest.raises(GateError, match="none of 2 answers to test prompts ended within 9"),
    ):
        check_answers_end(model, [(prompt, 9), (prompt[1:], 9)])


def test_a_verified_file_tells_what_was_checked(gguf: Path, tokenizer: Any, examples: Any) -> None:
    record, losses = verify_gguf(gguf, tokenizer, examples.to_list())

    assert record["tokenizer"]["num_texts"] > len(STRINGS)
    assert record["chat_template"]["identical"] is True
    assert record["special_tokens"]["eos_token_id"] == tokenizer.eos_token_id
    assert len(losses) == len(examples)


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 100)

    with (
        pytest.raises(ModelError, match=r"x\.gguf: llama\.cpp cannot load this file"),
        open_gguf(tmp_path / "x.gguf", num_ctx=32),
    ):
        pass


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q5_K_M", "IQ4_XS"])
def test_each_quantisation_makes_a_smaller_file_that_scores_close(
    version: PromotionPaths, gguf: Path, examples: Any, tmp_path: Path, name: str
) -> None:
    (quantization,) = check_quantizations([name])
    quantize(gguf, tmp_path / "x.gguf", quantization)

    losses = _trial_losses(version, examples)
    with open_gguf(tmp_path / "x.gguf", num_ctx=128) as model:
        losses[name] = model.example_losses(examples.to_list())
    with open_gguf(gguf, num_ctx=128) as model:
        losses["F16"] = model.example_losses(examples.to_list())

    assert check_losses(losses)["loss"][name] < 1
    assert (tmp_path / "x.gguf").stat().st_size < 0.6 * gguf.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_an_unknown_quantisation_gets_the_list_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"q4_k_m, but must be one of Q4_K_M, .*; did you mean"):
        check_quantizations(["q4_k_m"])


def test_a_failed_quantisation_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"nothing")

    with pytest.raises(ModelError, match=r"bad\.gguf: llama\.cpp cannot quantise it to Q4_K_M"):
        quantize(tmp_path / "bad.gguf", tmp_path / "x.gguf", QUANTIZATIONS["Q4_K_M"])

    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_failed_conversion_shows_its_log_and_leaves_no_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["NoSuchModel"]}')

    with pytest.raises(ModelError, match=r"llama.cpp's converter failed with status 1"):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf", "x")

    assert "NoSuchModel is not supported" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_adapter_of_another_model_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    version: PromotionPaths,
    examples: Any,
    tmp_path: Path,
) -> None:
    shutil.copytree(version.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    config = tiny_config(tmp_path_factory.getbasetemp())

    with pytest.raises(ModelError, match=r"is not an adapter for .*tiny-llama"):
        merge_adapter(config, tmp_path / "adapter", tmp_path / "merged", [[1, 2, 3]], examples, CPU)


def test_a_trial_over_4_bit_is_merged_onto_the_full_precision_base_which_is_scored(
    tmp_path_factory: pytest.TempPathFactory,
    version: PromotionPaths,
    examples: Any,
    tmp_path: Path,
) -> None:
    config = tiny_config(tmp_path_factory.getbasetemp())
    config = dataclasses.replace(config, load_in_4bit=True)

    merge = merge_adapter(
        config, version.adapter, tmp_path / "merged", [list(range(60, 90))], examples, CPU
    )

    assert merge.record["base"] == "full precision, trained over 4-bit"
    merged = load_merged(tmp_path / "merged", CPU).state_dict()
    expected = load_merged(version.merged, CPU).state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    base = _trial_losses(version, examples)["base"]  # the trained sweep's is in full precision
    assert merge.base is not None
    assert merge.base["loss_sum"].to_numpy() == pytest.approx(base["loss_sum"].to_numpy())


def test_what_ships_is_compared_with_its_own_base_and_not_with_the_4_bit_one() -> None:
    base, base_4bit = _losses([2.0] * 3), _losses([2.6] * 3)
    adapter, merged = _losses([2.2] * 3), _losses([2.1] * 3)
    losses = {"base": base, "base (4-bit)": base_4bit, "adapter (4-bit)": adapter}

    with pytest.raises(GateError, match=r"merged: .* must be below the base model's 2\.0000"):
        check_losses({**losses, "merged": merged, "F16": merged})
    # Within what two bases may differ by, which an adapter over its own base may not.
    shipped = _losses([1.9] * 3)
    adapter = _losses([2.05] * 3)
    checked = check_losses(
        {**losses, "adapter (4-bit)": adapter, "merged": shipped, "F16": shipped}
    )
    assert checked["tolerance"]["adapter (4-bit)"] == 0.2


def test_the_share_lost_is_of_what_the_adapter_changed_on_the_shipped_base() -> None:
    """Against the 4-bit base nearly nothing would seem lost, since that is far from both."""
    base, base_4bit = _losses([2.0] * 3), _losses([9.0] * 3)
    merged, f16 = _losses([1.99] * 3), _losses([1.992] * 3)
    losses = {"base": base, "base (4-bit)": base_4bit, "adapter (4-bit)": merged}

    with pytest.raises(GateError, match="by 20% of what the adapter changed"):
        check_losses({**losses, "merged": merged, "F16": f16})


@pytest.mark.slow
def test_the_demo_model_has_the_same_tokens_and_losses_in_llama_cpp(tmp_path: Path) -> None:
    config = TrialConfig(dtype="float32", max_eval_samples=8, max_length=256)
    tokenizer = load_tokenizer(config)
    export_gguf(prepare_demo_model(), tmp_path / "demo.gguf", "demo")
    examples = load_splits(config, tokenizer).test
    examples = examples.select(range(min(8, len(examples))))
    expected = example_losses(load_model(config), examples, 4)
    question = [{"role": "user", "content": "What is the capital of France?"}]

    with open_gguf(tmp_path / "demo.gguf", num_ctx=512) as model:
        own_texts = [str(tokenizer.decode(ids)) for ids in examples["input_ids"]]
        check_tokens(model, tokenizer, [*STRINGS, *own_texts])
        losses = model.example_losses(examples.to_list())
        answer = model.generate(model.chat_tokens(question), 50)

    assert mean_loss(losses) == pytest.approx(mean_loss(expected), abs=0.003)
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def _recording(opened: list[Decoder]) -> Any:
    """`open_decoder` that keeps what it opened."""

    @contextlib.contextmanager
    def open_and_keep(*args: Any) -> Iterator[Decoder]:
        with open_decoder(*args) as decoder:
            opened.append(decoder)
            yield decoder

    return open_and_keep


def _losses(loss_sums: list[float]) -> pd.DataFrame:
    ids = [str(n) for n in range(len(loss_sums))]
    return pd.DataFrame({"example_id": ids, "loss_sum": loss_sums, "num_tokens": 1})
