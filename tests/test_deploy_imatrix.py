"""The importance matrix: against a sum by hand, and against what llama.cpp's quantiser makes of it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from deploy_sweep import tiny_base
from transformers import AutoModelForCausalLM

from deploy.export_gguf import export_gguf
from deploy.gguf_types import QUANTIZATIONS
from deploy.imatrix import for_gguf, importance
from deploy.quantize import quantize, quantize_best
from training.exceptions import ModelError

EXAMPLES = [{"input_ids": list(range(start, start + 20))} for start in (100, 300, 700)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path_factory.getbasetemp())).eval()


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "tiny-F16.gguf"
    export_gguf(tiny_base(tmp_path_factory.getbasetemp()), path, "tiny")
    return path


def weights(path: Path, name: str) -> np.ndarray:
    [tensor] = [t for t in gguf.GGUFReader(path).tensors if t.name == name]
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def test_a_layers_importance_is_the_mean_square_of_its_inputs(model: Any) -> None:
    found = importance(model, EXAMPLES)
    inner = model.model
    with torch.no_grad():
        rows = [
            inner.layers[0].input_layernorm(inner.embed_tokens(torch.tensor(example["input_ids"])))
            for example in EXAMPLES
        ]
    expected = torch.cat(rows).square().mean(0).numpy()
    np.testing.assert_allclose(found["model.layers.0.self_attn.q_proj"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["model.layers.0.self_attn.v_proj"], expected, rtol=1e-5)
    assert len(found["model.layers.1.mlp.down_proj"]) == 512


def test_no_more_tokens_are_looked_at_than_asked_for(model: Any) -> None:
    one = importance(model, EXAMPLES[:1])
    limited = importance(model, EXAMPLES, num_tokens=10)
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(limited[name], one[name])


def test_every_quantised_matrix_has_its_importance_by_llama_cpps_name(
    model: Any, f16: Path
) -> None:
    found = for_gguf(importance(model, EXAMPLES), f16)
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert found.keys() >= {f"blk.{n}.{part}.weight" for n in range(2) for part in parts}
    assert {
        name: len(found[name]) for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
    } == {
        "blk.0.attn_q.weight": 256,
        "blk.1.ffn_down.weight": 512,
    }


def test_the_quantiser_spares_the_columns_that_matter(f16: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_gate.weight"
    matters = np.full(256, 1e-3, np.float32)
    matters[::8] = 1.0
    kind = QUANTIZATIONS["Q4_K_M"]
    quantize(f16, tmp_path / "plain.gguf", kind)
    quantize(f16, tmp_path / "weighed.gguf", kind, {name: matters})
    exact = weights(f16, name).astype(float)
    errors = {
        which: ((weights(tmp_path / f"{which}.gguf", name) - exact) ** 2)[:, ::8].mean()
        for which in ("plain", "weighed")
    }
    assert errors["weighed"] < 0.7 * errors["plain"]


def test_what_scores_better_is_kept(f16: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    examples = [
        {"example_id": str(n), "input_ids": ids, "labels": [-100] * 4 + ids[4:]}
        for n, ids in enumerate(rng.integers(100, 9000, (4, 24)).tolist())
    ]
    name = "blk.0.ffn_gate.weight"
    kind = QUANTIZATIONS["Q4_K_M"]
    out = tmp_path / "tiny-Q4_K_M.gguf"
    # What matters to nobody: all columns but one are left to chance.
    wrong = np.full(256, 1e-6, np.float32)
    wrong[0] = 1e6
    quantize(f16, tmp_path / "plain.gguf", kind)
    quantize(f16, tmp_path / "weighed.gguf", kind, {name: wrong})
    choice = quantize_best(f16, out, kind, {name: wrong}, examples)
    losses = choice["validation_loss"]
    assert choice["used"] == (losses["with"] <= losses["without"])
    kept = tmp_path / ("weighed.gguf" if choice["used"] else "plain.gguf")
    np.testing.assert_array_equal(weights(out, name), weights(kept, name))
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert quantize_best(f16, out, QUANTIZATIONS["Q8_0"], {name: wrong}, examples) == {
        "used": False
    }


def test_a_model_of_other_layers_is_refused(f16: Path) -> None:
    with pytest.raises(ModelError, match="none of its tensors is a layer"):
        for_gguf({"model.layers.0.self_attn.q_proj": np.ones(7, np.float32)}, f16)
