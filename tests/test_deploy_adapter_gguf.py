"""adapter.gguf over the base model is the merged model, in llama.cpp; and what its verification catches."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from deploy_sweep import tiny_base, tiny_config, trained_sweep
from safetensors.torch import load_file, save_file

from deploy.adapter_gguf import export_adapter, open_adapted, verify_adapter
from deploy.export_gguf import export_gguf
from deploy.merge import load_with_adapter
from training.data import load_splits
from training.evaluate import example_losses, mean_loss
from training.exceptions import GateError, ModelError
from training.model import load_model, load_tokenizer
from training.paths import SweepPaths, read_json


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def examples(root: Path) -> Any:
    config = tiny_config(root)
    return load_splits(config, load_tokenizer(config)).test.select(range(8))


@pytest.fixture(scope="module")
def adapters(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained adapter, and the same file under rsLoRA: other settings, the same scaling."""
    trained = SweepPaths(trained_sweep(root)).trial(0).adapter
    rslora = tmp_path_factory.mktemp("rslora") / "adapter"
    shutil.copytree(trained, rslora)
    config = read_json(rslora / "adapter_config.json")
    # alpha / sqrt(16) is alpha / 16 of the four times larger one.
    config |= {"use_rslora": True, "lora_alpha": config["lora_alpha"] / 4}
    (rslora / "adapter_config.json").write_text(json.dumps(config))
    return {"alpha/r": trained, "rslora": rslora}


@pytest.fixture(scope="module")
def base_gguf(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    export_gguf(tiny_base(root), path, "base")
    return path


@pytest.fixture(scope="module")
def losses(root: Path, adapters: dict[str, Path], examples: Any) -> dict[str, pd.DataFrame]:
    """Of base and base + adapter in Transformers."""
    config = tiny_config(root)
    adapted: Any = load_with_adapter(config, adapters["alpha/r"]).get_base_model()
    return {
        "base": example_losses(load_model(config), examples, 4),
        "merged": example_losses(adapted, examples, 4),
    }


@pytest.mark.parametrize("scaling", ["alpha/r", "rslora"])
def test_base_and_adapter_in_llama_cpp_score_as_in_peft(
    scaling: str,
    root: Path,
    adapters: dict[str, Path],
    base_gguf: Path,
    losses: dict[str, pd.DataFrame],
    examples: Any,
    tmp_path: Path,
) -> None:
    path = tmp_path / "adapter.gguf"

    export_adapter(adapters[scaling], tiny_base(root), path)

    with open_adapted(base_gguf, path, num_ctx=128) as gguf:
        found = gguf.example_losses(examples.to_list())
    assert found["loss_sum"].to_numpy() == pytest.approx(
        losses["merged"]["loss_sum"].to_numpy(), abs=0.05
    )
    assert mean_loss(found) < mean_loss(losses["base"]) - 1
    assert path.stat().st_size < base_gguf.stat().st_size / 20


def test_verification_takes_the_adapter_off_again(
    root: Path,
    adapters: dict[str, Path],
    losses: dict[str, pd.DataFrame],
    examples: Any,
    tmp_path: Path,
) -> None:
    merged = tmp_path / "merged.gguf"
    model: Any = load_with_adapter(tiny_config(root), adapters["alpha/r"])
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(tiny_config(root)).save_pretrained(tmp_path / "merged")
    export_gguf(tmp_path / "merged", merged, "merged")
    path = tmp_path / "adapter.gguf"
    export_adapter(adapters["alpha/r"], tmp_path / "merged", path)

    record = verify_adapter(path, merged, examples.to_list(), losses["merged"], losses["base"])

    assert record["merged_less_adapter_loss"] == pytest.approx(record["base_loss"], abs=0.01)
    assert record["difference_share"] < 0.01
    # The same matrices at half their size: a lost factor, as of rsLoRA.
    half = tmp_path / "half"
    shutil.copytree(adapters["alpha/r"], half)
    weights = load_file(half / "adapter_model.safetensors")
    save_file(
        {name: w * 0.5 if "lora_B" in name else w for name, w in weights.items()},
        half / "adapter_model.safetensors",
    )
    export_adapter(half, tmp_path / "merged", tmp_path / "half.gguf")
    with pytest.raises(GateError, match=r"half\.gguf: .* the file is not the adapter"):
        verify_adapter(
            tmp_path / "half.gguf", merged, examples.to_list(), losses["merged"], losses["base"]
        )


def test_an_adapter_of_another_model_is_refused(base_gguf: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "adapter.gguf"
    damaged.write_bytes(base_gguf.read_bytes()[:5000])

    with (
        pytest.raises(ModelError, match=r"adapter\.gguf: llama\.cpp cannot load it over base"),
        open_adapted(base_gguf, damaged, num_ctx=32),
    ):
        pass


def test_a_failing_converter_leaves_no_file_and_names_the_adapter(
    root: Path, adapters: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapters["alpha/r"], broken)
    save_file({"model.other.weight": torch.zeros(2, 2)}, broken / "adapter_model.safetensors")

    with pytest.raises(ModelError, match=r"broken: llama\.cpp's converter failed with status 1"):
        export_adapter(broken, tiny_base(root), tmp_path / "adapter.gguf")

    assert "Not a lora_A or lora_B tensor" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.gguf"))
