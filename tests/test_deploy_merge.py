"""The streamed merge is PEFT's merge, for every architecture and setting, and refuses what does not fit."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_packs import TINY, make_examples
from transformers import AutoModelForCausalLM

from deploy.four_bit import DEQUANTISED, FULL_PRECISION
from deploy.merge import load_merged, load_with_adapter, merge_adapter
from deploy.shards import cast_model, plan_merge, write_merged, write_model
from training.config import TrialConfig
from training.evaluate import example_losses, mean_loss
from training.exceptions import ModelError
from training.paths import read_json, write_json

CPU = torch.device("cpu")
IDS = [list(range(60, 90))]
ROOT = Path(__file__).parent.parent


def make_base(directory: Path, kind: str = "Llama", **settings: Any) -> TrialConfig:
    """A tiny random model in several files."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory, max_shard_size="60KB")
    return TrialConfig(model_name_or_path=str(directory), dtype="float32")


def make_adapter(base: TrialConfig, directory: Path, **settings: Any) -> Any:
    """A random adapter on all linear layers, and the model that has it."""
    model = AutoModelForCausalLM.from_pretrained(base.model_name_or_path, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    peft: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight.data, std=0.3)
    peft.save_pretrained(str(directory))
    return peft.eval()


def merge(base: TrialConfig, adapter: Path, target: Path, **options: Any) -> dict[str, Any]:
    write_merged(plan_merge(base, adapter), target, **options)
    return AutoModelForCausalLM.from_pretrained(_with_config(base, target)).state_dict()


def _with_config(base: TrialConfig, target: Path) -> Path:
    config = transformers.AutoConfig.from_pretrained(base.model_name_or_path)
    config.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("kind", "model", "adapter"),
    [
        ("Llama", {}, {}),
        ("Llama", {"tie_word_embeddings": True}, {"use_rslora": True}),
        ("Llama", {}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.*": 3}}),
        ("Llama", {}, {"target_modules": ["lm_head", "embed_tokens", "v_proj"]}),
        ("Qwen3", {}, {}),
        ("Gemma2", {"tie_word_embeddings": True}, {}),
        ("Mistral", {}, {}),
        ("Phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("GPT2", {"n_embd": 48, "n_layer": 2, "n_head": 6}, {"fan_in_fan_out": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_the_merge_is_pefts_own(
    kind: str, model: dict[str, Any], adapter: dict[str, Any], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", kind, **model)
    expected = make_adapter(base, tmp_path / "adapter", **adapter).merge_and_unload().state_dict()

    merged = merge(base, tmp_path / "adapter", tmp_path / "merged")

    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        assert (merged[name] - weight).abs().max() <= 1e-6, name
    names = {path.name for path in (tmp_path / "base").glob("*.safetensors*")}
    assert len(names) > 3
    assert {path.name for path in (tmp_path / "merged").glob("*.safetensors*")} == names


def test_a_base_whose_tensors_are_named_otherwise_is_merged_and_keeps_its_names(
    tmp_path: Path,
) -> None:
    """As GPT-2 is on the hub: files of the inner model, without its prefix."""
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    expected = make_adapter(base, tmp_path / "adapter").merge_and_unload().state_dict()
    index = tmp_path / "base" / "model.safetensors.index.json"
    names: dict[str, str] = {}
    for file in (tmp_path / "base").glob("*.safetensors"):
        tensors = {name.removeprefix("model."): t for name, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        names.update(dict.fromkeys(tensors, file.name))
    write_json(index, {"metadata": {}, "weight_map": names})

    merged = merge(base, tmp_path / "adapter", tmp_path / "merged")

    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert read_json(tmp_path / "merged" / index.name)["weight_map"] == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_made_in_float32_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    expected = make_adapter(base, tmp_path / "adapter").merge_and_unload().state_dict()

    plan = plan_merge(base, tmp_path / "adapter")
    write_merged(plan, tmp_path / "merged", dtype)

    for file in (tmp_path / "merged").glob("*.safetensors"):
        for name, weight in load_file(file).items():
            assert torch.equal(weight, expected[name].to(dtype)), name


def test_an_adapter_of_another_base_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    base, wider = make_base(tmp_path / "base"), make_base(tmp_path / "wider", hidden_size=96)
    deeper = make_base(tmp_path / "deeper", num_hidden_layers=3)
    for other, message in (
        (
            wider,
            r"the shape of model\.layers\.0\.\S+ is \[.*\], but the adapter's layer is \[.*\]$",
        ),
        (deeper, r"the base's files hold no weight of its layer model\.layers\.2\.\S+$"),
    ):
        adapter = tmp_path / f"adapter-{Path(other.model_name_or_path).name}"
        make_adapter(other, adapter)
        with pytest.raises(ModelError, match=f"is not an adapter for .*base: {message}"):
            merge_adapter(base, adapter, tmp_path / "merged", [[1, 2]], make_examples(), CPU)

    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "dora", use_dora=True)
    make_adapter(base, tmp_path / "saved", modules_to_save=["lm_head"])
    make_adapter(base, tmp_path / "pissa")
    settings = read_json(tmp_path / "pissa" / "adapter_config.json")
    write_json(
        tmp_path / "pissa" / "adapter_config.json", {**settings, "init_lora_weights": "pissa"}
    )

    for name, message in (
        ("dora", r"lora_magnitude_vector is neither lora_A nor lora_B"),
        ("saved", r"lm_head\.weight is neither lora_A nor lora_B"),
        ("pissa", r"it needs a base that is changed for it \(pissa\)"),
    ):
        with pytest.raises(ModelError, match=message):
            plan_merge(base, tmp_path / name)


def test_a_damaged_incomplete_or_quantised_base_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    config = read_json(tmp_path / "base" / "config.json")

    write_json(tmp_path / "base" / "config.json", {**config, "quantization_config": {}})
    with pytest.raises(ModelError, match="its files are quantised"):
        plan_merge(base, tmp_path / "adapter")
    write_json(tmp_path / "base" / "config.json", config)
    files[0].write_bytes(files[0].read_bytes()[:-100])
    with pytest.raises(ModelError, match="its weights are damaged"):
        plan_merge(base, tmp_path / "adapter")
    files[0].unlink()
    with pytest.raises(ModelError, match="are not there or not complete"):
        plan_merge(base, tmp_path / "adapter")


@pytest.mark.parametrize("trained_over_4bit", [True, False])
def test_a_4_bit_trial_is_merged_onto_the_base_with_the_lower_validation_loss(
    trained_over_4bit: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The validation examples are what base + adapter says, with the one base or the other."""
    full = TrialConfig(model_name_or_path=str(tiny_model_dir), dtype="float32")
    config = dataclasses.replace(full, load_in_4bit=True)
    make_adapter(full, tmp_path / "adapter")
    trained = load_with_adapter(config if trained_over_4bit else full, tmp_path / "adapter")
    validation = _said_by(trained)

    found = merge_adapter(
        config, tmp_path / "adapter", tmp_path / "merged", IDS, validation, CPU, validation
    )

    losses = found.record["loss_by_base"]
    base: Any = trained.get_base_model()
    expected = mean_loss(example_losses(base, validation, 4))
    chosen = DEQUANTISED if trained_over_4bit else FULL_PRECISION
    assert losses[chosen] == pytest.approx(expected, abs=1e-4)
    assert losses[chosen] == min(losses.values()) < max(losses.values())
    assert found.record["base"].startswith(chosen)
    assert found.record["kl_divergence"] < 1e-6
    merged, ids = load_merged(tmp_path / "merged", CPU), torch.tensor(IDS)
    with torch.inference_mode():
        difference = (merged(ids).logits - trained(input_ids=ids).logits).abs().max()
    assert difference < 1e-3
    assert found.base is not None
    assert (found.dequantised_base is not None) == trained_over_4bit
    if found.dequantised_base is not None:
        with trained.disable_adapter():
            own = example_losses(base, validation, 4)
        assert mean_loss(found.dequantised_base) == pytest.approx(mean_loss(own), abs=1e-4)
        assert abs(mean_loss(found.dequantised_base) - mean_loss(found.base)) > 1e-3


def _said_by(model: Any) -> Dataset:
    starts = torch.arange(200, 208)[:, None]
    told = model.generate(
        input_ids=starts,
        attention_mask=torch.ones_like(starts),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
    )
    rows = [
        {"example_id": str(number), "input_ids": ids, "labels": [-100, *ids[1:]]}
        for number, ids in enumerate(told.tolist())
    ]
    return Dataset.from_list(rows)


def test_memory_holds_a_tensor_and_not_the_model(tmp_path: Path) -> None:
    base = make_base(
        tmp_path / "base",
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        head_dim=128,
    )
    make_adapter(base, tmp_path / "adapter")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from deploy.shards import plan_merge, write_merged\n"
        "from training.config import TrialConfig\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "plan = plan_merge(TrialConfig(model_name_or_path=sys.argv[1]), Path(sys.argv[2]))\n"
        "before = peak(); write_merged(plan, Path(sys.argv[3])); print(peak() - before)\n"
    )
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    grown = subprocess.check_output([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True)

    size = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    assert size > 300e6
    assert int(grown) * 1024 < 100e6


def test_a_model_that_is_rounded_later_is_the_one_that_was_rounded_at_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    plan = plan_merge(base, tmp_path / "adapter")
    write_merged(plan, tmp_path / "at once", dtype=torch.bfloat16)
    write_merged(plan, _with_config(base, tmp_path / "later"))

    cast_model(tmp_path / "later", torch.bfloat16)

    files = {path.name for path in (tmp_path / "at once").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    for name in files:
        first, second = (tmp_path / folder / name for folder in ("at once", "later"))
        assert first.read_bytes() == second.read_bytes(), name
    assert read_json(tmp_path / "later" / "config.json")["dtype"] == "bfloat16"
    assert not list((tmp_path / "later").glob(".*"))


def test_every_file_that_goes_with_the_weights_is_there(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = TrialConfig(model_name_or_path=str(tiny_model_dir), dtype="float32")
    make_adapter(base, tmp_path / "adapter")

    write_model(plan_merge(base, tmp_path / "adapter"), tmp_path / "merged", dtype=torch.bfloat16)

    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert read_json(tmp_path / "merged" / "config.json")["dtype"] == "bfloat16"
